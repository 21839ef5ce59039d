"""Files changed at random; the same generator gives the same change."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from random import Random
from typing import Any

from tests.trust.attacks import ESCAPES

MARKUP = (
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://evil)", "|a|b|", "```", "---\n", "{{7*7}}",
    "<img src=x onerror=alert(1)>", "http://evil", "www.evil.com", "&lt;b&gt;", "\n\n# x\n", "<!--", "@somebody", "#1",
    "$\\href{x}{y}$", "\\", "`", "'\"><svg/onload=alert(1)>",
)  # fmt: skip
TEXTS = (
    "", "1", "\0", ESCAPES, "${oc.env:HOME}", "../../etc/passwd", "/etc/passwd", "x" * 100_000, "NaN", "null", ":",
    "A+B", "*", "=", "\ud800", *MARKUP,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**64), 1.5, -1e-300, 1e308, [], {}, [[]], [1] * 1000,
    {"a": {"b": {}}}, *TEXTS,
)  # fmt: skip
RAW = (
    "1e400", "-Infinity", "NaN", "9" * 400, "-" + "9" * 400, "9" * 5000, "[" * 2000 + "]" * 2000,
    '{"a":' * 2000 + "1" + "}" * 2000, '"\\ud800"', "1.0", "-0", "01", '{"a":1,"a":2}', "'x'", "1e-400", "tru", "[1,]",
)  # fmt: skip
NUMBERS = (
    0, 1, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1,
    (1 << 64) - 1,
)  # fmt: skip


def changed_bytes(random: Random, content: bytes, near: bytes = b"") -> bytes:
    """Bits turned, ranges removed, repeated, moved or set to odd numbers.

    `near` is a pattern of places that matter: half of the changes lie soon after one of them.
    """
    changed = bytearray(content)
    places = [found.start() for found in re.finditer(near, content)] if near else []
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        if not changed:
            break
        place = random.randrange(len(changed))
        if places and random.random() < 0.5:
            place = min(random.choice(places) + random.randrange(200), len(changed) - 1)
        length = min(random.choice((1, 1, 2, 4, 8, 16, 100)), len(changed) - place)
        match random.randrange(7):
            case 0:
                changed[place] ^= 1 << random.randrange(8)
            case 1:
                changed[place] = random.choice((0, 1, 0x7F, 0xFF, random.randrange(256)))
            case 2:
                size = random.choice((1, 2, 4, 8))
                number = random.choice(NUMBERS) + random.choice((-1, 0, 1)) & (1 << 8 * size) - 1
                changed[place : place + size] = number.to_bytes(size, random.choice(("little", "little", "big")))
            case 3:
                del changed[place : place + length]
            case 4:
                changed[place:place] = changed[place : place + length] * random.choice((1, 1, 50))
            case 5:
                source = random.randrange(len(changed))
                changed[place : place + length] = changed[source : source + length]
            case 6:
                del changed[place if random.random() < 0.3 else len(changed) - 1 :]
    return bytes(changed)


def changed_json(random: Random, text: str) -> str:
    """Values replaced, removed, renamed, repeated or moved, some of them by what JSON has no word for."""
    content = json.loads(text)
    raw: list[str] = []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        nodes = list(_nodes(content))
        if not nodes:
            break
        parent, key = random.choice(nodes)
        match random.randrange(8):
            case 0 | 1 | 2:
                parent[key] = deepcopy(random.choice(VALUES))  # which may be changed in turn
            case 3:
                raw.append(random.choice(RAW))
                parent[key] = f"RAW={len(raw) - 1}="
            case 4:
                del parent[key]
            case 5:
                other, other_key = random.choice(nodes)
                parent[key] = json.loads(json.dumps(other.get(other_key) if isinstance(other, dict) else None))
            case 6 if isinstance(parent, dict):
                parent[random.choice(TEXTS)] = parent.pop(key)
            case 6:
                parent.extend(parent[key : key + 1] * random.choice((1, 2000)))
            case 7 if isinstance(parent[key], str):
                parent[key] = changed_text(random, parent[key])
            case 7 if isinstance(parent[key], int | float):
                parent[key] += random.choice((-1, 1, 0.5, 1000))
    written = json.dumps(content)
    for i, text in enumerate(raw):
        written = written.replace(f'"RAW={i}="', text)
    return written


def changed_text(random: Random, text: str) -> str:
    """Lines and words moved, repeated, removed or replaced."""
    for _ in range(random.choice((1, 1, 2, 4))):
        parts = re.split(r"(\W)", text)
        place = random.randrange(len(parts))
        match random.randrange(5):
            case 0:
                parts[place] = random.choice(TEXTS)
            case 1:
                parts[place] = random.choice(RAW)
            case 2:
                del parts[place : place + random.choice((1, 2, 10))]
            case 3:
                parts[place:place] = parts[place : place + 10] * random.choice((1, 1, 100))
            case 4:
                other = random.randrange(len(parts))
                parts[place], parts[other] = parts[other], parts[place]
        text = "".join(parts)[:1_000_000]  # of a text repeated a hundred times, again and again
    return text


def _nodes(content: Any) -> Any:
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(value, dict | list):
            yield from _nodes(value)
