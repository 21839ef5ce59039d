"""Whether a card is safe to show and to push, and whether the evaluation of a stranger is what it should be."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]

MAX_CARD = 1_000_000  # bytes
MAX_FRONT_MATTER = 64_000  # characters
MAX_DEPTH = 20  # of YAML
MAX_HTML = 2_000_000  # characters looked at in tags, those of a tag in a tag again
FRONT_MATTER = re.compile(r"\s*---\n([\S\s]*?)\n---[ \t]*(?:\n|$)")  # as the Hub and its client find it
FORBIDDEN_TAG = re.compile(
    r"</?(script|iframe|frame|frameset|object|embed|applet|form|style|link|meta|base|template|noscript|noembed|noframes"
    r"|xmp|plaintext|portal)(?![\w-])",
    re.IGNORECASE,
)
TAG = re.compile(r"</?[a-zA-Z][^ \t\n/>]*")
BETWEEN_ATTRIBUTES = re.compile(r"[ \t\n/]*")
ATTRIBUTE_NAME = re.compile(r"[^ \t\n/>][^ \t\n/>=]*")
EQUALS = re.compile(r"[ \t\n]*=[ \t\n]*")
UNQUOTED = re.compile(r"[^ \t\n>]*")
WORDS_ONLY = {"alt", "title", "aria-label"}  # attributes that never lead anywhere
DESTINATIONS = (
    re.compile(r"\]\(\s*<?([^()\[\]\n]*)"),  # [text](destination)
    re.compile(r"\]:\s*<?([^()\[\]\n]*)"),  # [label]: destination
    re.compile(r"<([^()\[\]\n<>]*)"),  # <destination>
)
SCRIPT = re.compile(r"(javascript|vbscript):")
SCHEME = re.compile(r"(javascript|vbscript|data):")
DATA_IN_ATTRIBUTE = re.compile(r"""(?:^|[,;(])["']?(data):""")
UNSEEN = re.compile(r"[\x00-\x20\x7f-\xa0\u00ad\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\\]")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
CONTAINERS = re.compile(r"[ \t]*(?:(?:>|[-*+]|\d{1,9}[.)])[ \t]*)*")  # of quotes and lists, before a line's own text
FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
HTML_UNTIL = (("<!--", "-->"), ("<?", "?>"), ("<![cdata[", "]]>"), ("<!", ">"), ("<pre", "</pre>"),
              ("<textarea", "</textarea>"))  # fmt: skip

MAX_METHODS = 64  # and metrics
MAX_NAME = 200  # characters
MAX_VALUE = 1e12
MAX_CONDITIONS = 1 << 40
DIRECTIONS = ("higher", "lower", "ideal 1")
EVALUATION_KEYS = {"format_version", "library_version", "model", "ceiling", "data", "split", "n_conditions", "metrics",
                   "mean", "n_undefined"}  # fmt: skip


def check_card(text: str) -> None:
    """Refuse a card without valid front matter, or with anything that could run in the browser of its reader.

    What stands in fenced code blocks that begin in the first column is shown as it is, and may be anything.

    Raises
    ------
    ValueError
        Over 1 MB; no YAML mapping between lines of --- at its top; a tag such as script, iframe, form or style; an
        event handler (onload=...); a javascript: or data: link. Names the line.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if found := CONTROL.search(text):
        _refuse(text, found.start(), f"has the control character U+{ord(found[0]):04X}")
    if (size := len(text.encode())) > MAX_CARD:
        raise ValueError(f"the card has {size:,} bytes; at most {MAX_CARD:,} are taken: shorten it.")
    block = FRONT_MATTER.match(text)
    if block is None:
        raise ValueError("the card has no front matter; begin it with YAML between two lines of ---.")
    _check_front_matter(text, block)
    as_written, unquoted = _outside_of_code(text, block.end())
    for found in FORBIDDEN_TAG.finditer(text[: block.end()] + unquoted[block.end() :]):
        _refuse(text, found.start(), f"has a <{found[1].lower()}> tag")
    for pattern in DESTINATIONS:
        for found in pattern.finditer(unquoted):
            if scheme := SCHEME.match(_as_a_browser_reads(found[1])):
                _refuse(text, found.start(), f"has a {scheme[1]}: link")
    looked_at = line = 0
    for tag in TAG.finditer(unquoted):
        line = max(line, text.rfind("\n", line, tag.start()) + 1)
        quoted = ">" in CONTAINERS.match(text, line)[0]  # type: ignore[index]  # else a > that begins a line ends the tag
        place = tag.end()
        for name, value, end in _attributes(unquoted if quoted else as_written, place):
            if value is not None and re.match("on[a-z]", name):
                _refuse(text, tag.start(), f"has the event handler {name[:40]}=")
            reading = "" if value is None or name in WORDS_ONLY else _as_a_browser_reads(value)
            if scheme := SCRIPT.search(reading) or DATA_IN_ATTRIBUTE.search(reading):
                _refuse(text, tag.start(), f"has a {scheme[1]}: link in {name[:40]}=")
            looked_at, place = looked_at + end - place, end
            if looked_at > MAX_HTML:
                _refuse(text, tag.start(), "has too much HTML, in tags that do not end")


def check_evaluation(content: dict[str, Any]) -> None:
    """Refuse an evaluation.json that is not what `Report.save` writes as scores.json.

    Raises
    ------
    ValueError
        A key is missing or unknown; a value is of the wrong kind, not finite or beyond belief. Names key and value.
    """
    if not isinstance(content, dict):
        _odd("it", content, "be a JSON object")
    if content.get("format_version") != 1 or isinstance(content["format_version"], bool):
        _odd("format_version", content.get("format_version"), "be 1")
    missing, unknown = sorted(EVALUATION_KEYS - content.keys()), sorted(content.keys() - EVALUATION_KEYS, key=str)
    if missing or unknown:
        _odd("it", (missing + unknown)[0], f"have the keys {', '.join(sorted(EVALUATION_KEYS))} and no others")
    for key in ("library_version", "model", "ceiling"):
        _check_name(key, content[key])
    if content["data"] is not None:
        _check_name("data", content["data"])
    if (split := content["split"]) is not None:
        if not isinstance(split, dict) or set(split) != {"hold_out", "sha256"}:
            _odd("split", split, "be null or have the keys hold_out and sha256")
        if not isinstance(split["hold_out"], list) or not all(isinstance(word, str) for word in split["hold_out"]):
            _odd("split.hold_out", split["hold_out"], "be a list of texts")
        sha = split["sha256"]
        if sha is not None and (not isinstance(sha, str) or re.fullmatch("[0-9a-f]{64}", sha) is None):
            _odd("split.sha256", sha, "be null or 64 hexadecimal digits")
    n_conditions = content["n_conditions"]
    if type(n_conditions) is not int or not 0 < n_conditions < MAX_CONDITIONS:
        _odd("n_conditions", n_conditions, "be a whole number greater than 0")
    metrics = content["metrics"]
    if not isinstance(metrics, dict) or not 0 < len(metrics) <= MAX_METHODS:
        _odd("metrics", metrics, f"name 1 to {MAX_METHODS} metrics")
    for metric, direction in metrics.items():
        _check_name("metrics", metric)
        if direction not in DIRECTIONS:
            _odd(f"metrics.{metric}", direction, f"be one of {', '.join(DIRECTIONS)}")
    for key in ("mean", "n_undefined"):
        table = content[key]
        if not isinstance(table, dict) or not 0 < len(table) <= MAX_METHODS or content["model"] not in table:
            _odd(key, table, f"have the model {content['model']!r} and at most {MAX_METHODS} methods")
        if table.keys() != content["mean"].keys():
            _odd(key, sorted(table), "have the methods of mean")
        for method, row in table.items():
            _check_name(key, method)
            if not isinstance(row, dict) or row.keys() != metrics.keys():
                _odd(f"{key}.{method}", row, "have a value for each of metrics and nothing else")
            for metric, value in row.items():
                if key == "mean":
                    number = type(value) in (int, float) and abs(value) <= MAX_VALUE
                    if value is not None and not number:
                        _odd(f"mean.{method}.{metric}", value, f"be null or a number of at most {MAX_VALUE:g}")
                elif type(value) is not int or not 0 <= value <= n_conditions:
                    _odd(f"n_undefined.{method}.{metric}", value, f"be a whole number from 0 to {n_conditions}")


def _refuse(text: str, place: int, what: str) -> NoReturn:
    line = text.count("\n", 0, place) + 1
    raise ValueError(
        f"the card {what} in line {line} ({text[place : place + 40]!r}), which could run in a reader's browser or hide "
        "something; remove it, or show it in a code block."
    )


def _check_front_matter(text: str, block: re.Match[str]) -> None:
    front, first_line = block[1], text.count("\n", 0, block.start(1)) + 1
    if len(front) > MAX_FRONT_MATTER:
        raise ValueError(
            f"the card's front matter has {len(front):,} characters; at most {MAX_FRONT_MATTER:,} are read."
        )
    try:
        depth = 0
        for event in yaml.parse(front, Loader=yaml.SafeLoader):
            line = first_line + event.start_mark.line
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ValueError(f"the card's front matter has an anchor or alias in line {line}; write values out.")
            if getattr(event, "tag", None) is not None:
                raise ValueError(
                    f"the card's front matter has the YAML tag {event.tag[:40]!r} in line {line}; remove it."
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"the card's front matter is nested deeper than {MAX_DEPTH} in line {line}.")
        content = _load(front)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {first_line + mark.line}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"the card's front matter is not valid YAML{where} ({problem[:120]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"the card's front matter must be a YAML mapping, not a {type(content).__name__}.")
    for key, value in _links(content):
        if scheme := SCHEME.match(_as_a_browser_reads(value)):
            raise ValueError(
                f"the card's front matter has a {scheme[1]}: link in {key[:40]!r}; link to https addresses."
            )


def _load(front: str) -> Any:
    try:
        return yaml.safe_load(front)
    except yaml.YAMLError:
        raise
    except (ValueError, OverflowError) as error:  # a date or number by its looks, as 2026-13-99
        raise ValueError(f"the card's front matter has a value that YAML cannot read ({error}); quote it.") from error


def _links(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Texts under keys that sites make links of."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _links(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _links(value, key)
    elif isinstance(content, str) and re.search("url|link|thumbnail|image|homepage", key.lower()):
        yield key, content


def _outside_of_code(text: str, start: int) -> tuple[str, str]:
    """The text with blanks for front matter and fenced code, and the same with blanks for the > of quotes as well.

    A block counts as code only where every reader must take it so: its fence begins in the first column, outside of
    HTML. After any other fence nothing is code, because it may open or close a block for one reader and not another.
    """
    as_written, unquoted = [], []
    fence, clear = "", True  # the open fence; whether no doubtful one came before
    in_html, until = False, ""  # up to a blank line; up to this text, which may lie beyond blank lines
    place = 0
    for line in text.split("\n"):
        own = line[CONTAINERS.match(line).end() :]  # type: ignore[union-attr]
        shown = line
        if place < start:
            shown = " " * len(line)
        elif fence:
            shown = " " * len(line)
            closing = line.strip(" \t")
            if len(line) - len(line.lstrip(" ")) < 4 and len(closing) >= len(fence) and set(closing) == {fence[0]}:
                fence = ""
        elif opened := FENCE.match(own):
            if clear and line == own and not in_html:
                fence = opened[1] or opened[2]
            else:
                clear = False
        elif until:
            until = "" if until in line.lower() else until
        else:
            begun = next(((b, e) for b, e in HTML_UNTIL if own.lower().startswith(b)), None)
            if begun and begun[1] not in own.lower()[len(begun[0]) :]:
                until = begun[1]
            in_html = bool(own) and (in_html or own.startswith("<"))
        as_written.append(shown)
        prefix = line[: len(line) - len(own)] if shown == line else ""
        unquoted.append(prefix.replace(">", " ") + shown[len(prefix) :])
        place += len(line) + 1
    return "\n".join(as_written), "\n".join(unquoted)


def _attributes(text: str, place: int) -> Iterator[tuple[str, str | None, int]]:
    """Name, value and end of each attribute, as browsers part them; `place` is after the name of the tag."""
    while True:
        place = BETWEEN_ATTRIBUTES.match(text, place).end()  # type: ignore[union-attr]
        name = ATTRIBUTE_NAME.match(text, place)
        if name is None:
            return
        place, value = name.end(), None
        if equals := EQUALS.match(text, place):
            place = equals.end()
            if text[place : place + 1] in ('"', "'"):
                end = text.find(text[place], place + 1)
                end = len(text) if end < 0 else end
                value, place = text[place + 1 : end], end + 1
            else:
                value = UNQUOTED.match(text, place)[0]  # type: ignore[index]
                place += len(value)
        yield name[0].lower(), value, place


def _as_a_browser_reads(link: str) -> str:
    """Entities resolved; without blanks, what cannot be seen, and Markdown's backslashes."""
    return UNSEEN.sub("", html.unescape(link)).lower()


def _check_name(key: str, value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        _odd(key, value, f"be a text of 1 to {MAX_NAME} characters")


def _odd(key: str, value: Any, rule: str) -> NoReturn:
    raise ValueError(
        f"evaluation.json: {key[:80]} ({str(value)[:80]!r}) must {rule}; write it with `perturbdiff evaluate --out`."
    )
