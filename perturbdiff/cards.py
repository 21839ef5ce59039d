"""What the cards of models and atlases share: names of strangers as inert Markdown, licenses, the citation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MAX_SHOWN = 80  # characters of a name in a card
MAX_LISTED = 20  # names of a list
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


def license_fields(license: str | None) -> dict[str, str]:
    """Front matter of a license: identifiers that the Hub knows as `license`, others as `license_name`."""
    if license is None or not plain(license):
        return {}
    if (identifier := license.strip().lower()) in LICENSES:
        return {"license": identifier}
    name = re.sub(r"[^a-z0-9.]+", "-", plain(license).lower()).strip("-.")  # the Hub wants an id
    return {"license": "other", "license_name": name or "custom"}
