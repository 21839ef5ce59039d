"""What the cards of models and atlases share: names of strangers as inert Markdown, licenses, the citation.

Parts that are generated stand between two comments. Where a card is written again these parts are replaced, and what
its owner wrote stays.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

MAX_SHOWN = 80  # characters of a name in a card
MAX_LISTED = 20  # names of a list
MAX_CARD_BYTES = 1 << 22  # of a README.md that is looked at
BEGIN, END = "<!-- generated: {} -->", "<!-- end of generated -->"
MARKER = re.compile(r"^<!-- (?:generated: [\w ]+|end of generated) -->$", re.MULTILINE)
GENERATED = re.compile(
    r"^<!-- generated: ([\w ]+) -->$(?:(?!^<!-- (?:generated: |end of generated)).)*^<!-- end of generated -->$",
    re.DOTALL | re.MULTILINE,
)
FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
OWN_KEYS = frozenset({
    "license", "license_name", "library_name", "tags", "datasets", "base_model", "base_model_relation", "model-index",
    "pretty_name", "size_categories", "configs",
})  # fmt: skip
"""Keys of the front matter that are written anew; an owner's tags stay beside ours, a license where we know none."""
SYNTAX = re.compile(r"[\\`*\[\]<>&|~{}$@#]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
"""What Markdown, HTML, templates or automatic links could take for their own; an underscore within a word is not."""

LICENSES = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1",
    "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "llama2", "gemma", "unknown", "other",
})  # fmt: skip
"""Identifiers that the Hub takes as `license` (https://huggingface.co/docs/hub/repositories-licenses)."""

CITATION = """\
The method: Yuan et al. 2026, [arXiv:2602.19685](https://arxiv.org/abs/2602.19685).

```bibtex
@misc{yuan2026,
  author = {Yuan and others},
  year = {2026},
  eprint = {2602.19685},
  archivePrefix = {arXiv}
}
```
"""


def plain(value: Any, most: int = MAX_SHOWN) -> str:
    """One line of at most `most` characters: breaks become spaces, what cannot be printed U+FFFD."""
    text = str(value)[: most * 8]
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else shown[: most - 1].rstrip() + "…"


def escaped(value: Any, most: int = MAX_SHOWN) -> str:
    """`plain` text that every Markdown renderer shows letter by letter, in a table or within a line."""
    return SYNTAX.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), plain(value, most)) or '""'


def front_text(value: Any, most: int = MAX_SHOWN) -> str:
    """`plain` text for a value of the front matter, which sites show as it is: without < and >."""
    return plain(str(value).replace("<", "").replace(">", ""), most)


def listed(names: Sequence[Any]) -> str:
    """The first names, escaped, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return ", ".join(escaped(name) for name in names[:MAX_LISTED]) + more


def card_text(front_matter: str, parts: Mapping[str, str]) -> str:
    """A card of generated parts by name; `front_matter` is YAML that ends with a line break."""
    body = "\n\n".join(f"{BEGIN.format(name)}\n{text.strip()}\n\n{END}" for name, text in parts.items())
    return f"---\n{front_matter}---\n{body}\n"


def read_card(path: Path) -> str | None:
    """The text of a README.md, its line ends as they are; None where there is none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
            return None
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def renewed(card: str, old: str | None, where: str) -> str:
    """A generated card `with_own_text` of the older one; warns where that one is kept as it is."""
    if old is None:
        return card
    if not _parts_of(old):
        warnings.warn(
            f"the README.md of {where} has no generated parts, or not both marks of each: it is kept as it is, and its "
            "scores may be old. Remove it there for a new one.",
            UserWarning,
            stacklevel=2,
        )
    return with_own_text(card, old)


def with_own_text(card: str, old: str) -> str:
    """A generated card with what an owner wrote into an older one; the older one itself where it has no such parts."""
    if not _parts_of(old):
        return old
    old, parts = old.replace("\r\n", "\n"), _parts_of(card)
    front, old_front = FRONT_MATTER.match(card), FRONT_MATTER.match(old)
    assert front is not None, "a generated card has front matter"
    head = front[1] if old_front is None else _with_own_keys(front[1], old_front[1])
    body = old if old_front is None else old[old_front.end() :]
    return f"---\n{head}---\n{GENERATED.sub(lambda found: parts.get(found[1], ''), body)}"


def _parts_of(card: str) -> dict[str, str]:
    # By name, marks included; none where a mark stands alone.
    card = card.replace("\r\n", "\n")
    parts = {found[1]: found[0] for found in GENERATED.finditer(card)}
    return parts if 2 * len(parts) == len(MARKER.findall(card)) else {}


def _with_own_keys(front: str, old: str) -> str:
    # As text: a YAML library would write `language: no` as false, and 1.10 as 1.1.
    ours, theirs = _by_key(front), _by_key(old)
    tags = [tag for tag in _tags(theirs) if tag not in _tags(ours)]
    if tags:
        ours["tags"] = yaml.safe_dump({"tags": [*_tags(ours), *tags]}, sort_keys=False, allow_unicode=True)
    replaced = OWN_KEYS if "license" in ours else OWN_KEYS - {"license", "license_name"}
    return "".join([*ours.values(), *(text for key, text in theirs.items() if key not in replaced)])


def _by_key(front: str) -> dict[str, str]:
    # The lines of each key; what is indented, a list or a comment belongs to the key above.
    texts = re.split(r"""^(?=["'\w][^\n:]*:)""", front, flags=re.MULTILINE)
    return {text.partition(":")[0].strip(" \t\"'"): text for text in texts if text.strip()}


def _tags(front: Mapping[str, str]) -> list[str]:
    try:
        tags = yaml.safe_load(front.get("tags", ""))["tags"]
    except (yaml.YAMLError, RecursionError, KeyError, TypeError, ValueError):
        return []
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def license_fields(license: str | None) -> dict[str, str]:
    """Front matter of a license: identifiers that the Hub knows as `license`, others as `license_name`."""
    if license is None or not plain(license):
        return {}
    if (identifier := license.strip().lower()) in LICENSES:
        return {"license": identifier}
    name = re.sub(r"[^a-z0-9.]+", "-", plain(license).lower()).strip("-.")  # the Hub wants an id
    return {"license": "other", "license_name": name or "custom"}
