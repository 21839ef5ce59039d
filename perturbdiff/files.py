"""Files: of strangers, inside their folder, of a bearable size, with the right hash, typed; ours, hashed and on disk.

And what a terminal shows: long lines, and the progress bar of all long work.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from glob import escape
from pathlib import Path
from threading import RLock
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from tqdm import tqdm

WIDTH = 80  # of what a terminal shows
MAX_WHAT = 24  # characters before a bar, which otherwise would have no room
WITHOUT_RATE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
MAX_DEPTH = 64  # of JSON
MAX_BRACKETS = 1 << 20  # in JSON: an empty list or object takes thirty times the memory of its two characters


def inside(folder: Path, name: str) -> Path:
    """The path of a file, which must lie in the folder, or where the Hub's cache keeps the files of the repo."""
    root = folder.resolve()
    for parent in (root, *root.parents):  # in that cache files are links to ../../blobs
        if parent.parent.name == "snapshots" and parent.parents[1].name.startswith(("models--", "datasets--")):
            root = parent.parents[1]
            break
    path = folder / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: of links in a circle
        raise ValueError(f"{path} leads nowhere ({short(error)}); put the file itself there.") from error
    if not real.is_relative_to(root):
        raise ValueError(f"{path} leads out of the folder, to {real}; put the file itself there.")
    return path


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def json_sha256(content: Any) -> str:
    """Hash of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_inputs(outputs: Iterable[str | Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Raises FileExistsError where a file to write is one that is read: --overwrite is about earlier outputs."""
    given = [path for path in inputs if path]
    for path in (path for path in outputs if path):
        for read in given:
            if os.path.isfile(path) and os.path.isfile(read) and os.path.samefile(path, read):
                raise FileExistsError(f"output {path} is an input ({read}); choose another name.")


def check_output(path: str | Path, *endings: str, overwrite: bool = False) -> Path:
    """Where a file is to be written, refused before the work that would be lost.

    Raises ValueError where its name has none of these endings, if any are given; FileExistsError where it is a folder,
    or a file that must not be overwritten.
    """
    path = Path(path)
    if endings and path.suffix not in endings:
        raise ValueError(f"output {path} must end in {' or '.join(endings)}; that is what can be written.")
    if path.is_dir():
        raise FileExistsError(f"output {path} is a folder; give the name of a file.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"output {path} exists; choose another name, or overwrite it (--overwrite).")
    return path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file to fill that then becomes `path`, on disk: the new file whole, or what was there before.

    It lies beside `path`, under a name of this process's own: another may be writing the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield temporary
        to_disk(temporary)
        temporary.replace(path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(new: Path, final: Path) -> None:
    """Flush the folder `new` and move it to `final`; what stood there is removed last, or is left with a warning."""
    for path in (*new.rglob("*"), new):
        to_disk(path)
    aside = set_aside(final) if final.exists() else None
    try:
        new.rename(final)
    except OSError:
        if aside is not None:
            (aside / "folder").rename(final)
            aside.rmdir()
        raise
    to_disk(final.parent)
    for left in _asides(final):
        remove(left)


def restore_folder(final: Path) -> None:
    """Put back what `replace_folder` had moved away when it was killed; only where nobody else may be replacing it."""
    for aside in [] if final.exists() else _asides(final):
        if (aside / "folder").is_dir():
            (aside / "folder").rename(final)
            aside.rmdir()
            return


def set_aside(folder: Path) -> Path:
    """Move a folder into a hidden one beside it, at one stroke: nobody finds a part of it under its name."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(aside / "folder")
    return aside


def _asides(folder: Path) -> list[Path]:
    return sorted(folder.parent.glob(f".{escape(folder.name)}-old-*"))


def remove(folder: Path) -> None:
    """Remove a folder that nobody needs; a warning where that fails, as on NFS while somebody has a file of it open."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if folder.exists():
            text = f"{folder} is no longer needed but could not be removed ({short(error)}); it is tried again later"
            warnings.warn(text, UserWarning, stacklevel=2)


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object in which every name stands once and every number is one of 64 bits.

    Raises ValueError where the file is too large, too deep or something else.
    """
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read.")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes | str, path: str) -> dict[str, Any]:
    """The same of what was read already; `path` is what a message calls it."""
    try:
        text = text if isinstance(text, str) else text.decode()
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise ValueError(f"more than {MAX_BRACKETS:,} brackets")
        content = json.loads(
            text,
            object_pairs_hook=_names_once,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_number,
        )
        json.dumps(content, ensure_ascii=False).encode()  # fails with halves of characters, which cannot be written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({short(error)}); get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}; get it again.")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    if level:  # what is read is written and compared by functions that call themselves
        raise ValueError(f"{path} is nested deeper than {MAX_DEPTH}; get it again.")
    return content


def write_text(path: Path, text: str) -> None:
    """As UTF-8, whole."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole; NaN and infinity, which JSON has not, are a ValueError."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def typed(kind: Any, content: Any, where: str) -> Any:
    """JSON of a stranger as a dataclass: every field there and no other, of its own kind; no value is made to fit.

    Parameters
    ----------
    kind
        A dataclass whose fields are str, bool, int (not negative), float, Literal of texts, X | None, tuple[X, ...],
        dict[str, X], other dataclasses, or Any; or one of these.
    where
        What a message calls it.

    Raises
    ------
    ValueError
        A key is missing or unknown, a value of another kind; what the dataclass refuses when it is made. One printable
        line that names the key.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return content
    if is_dataclass(kind):
        hints: dict[str, Any] = _hints(kind)  # type: ignore[arg-type]
        if not isinstance(content, dict):
            _refuse(where, content, "be a JSON object")
        if content.keys() != hints.keys():
            lacking, unknown = sorted(hints.keys() - content.keys()), sorted(content.keys() - hints.keys())
            raise ValueError(f"{where} lacks {few(lacking)} and has unknown keys {few(unknown)}.")
        values = {name: typed(hint, content[name], f"{where}.{name}") for name, hint in hints.items()}
        try:
            return kind(**values)  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"{where}: {printable(str(error))}") from error
    if origin in (Union, UnionType):
        (some,) = (part for part in inner if part is not NoneType)
        return None if content is None else typed(some, content, where)
    if origin is tuple and isinstance(content, list):
        return tuple(typed(inner[0], value, f"{where}[{i}]") for i, value in enumerate(content))
    if origin is dict and isinstance(content, dict):
        return {key: typed(inner[1], value, f"{where}.{few([key])}") for key, value in content.items()}
    if origin is Literal:
        return content if content in inner else _refuse(where, content, f"be one of {', '.join(inner)}")
    if kind is float and type(content) in (int, float):
        return float(content)
    if type(content) is kind and not (kind is int and content < 0):
        return content
    return _refuse(where, content, f"be {_KINDS[origin or kind]}")


def short(error: BaseException) -> str:
    """The first line of a message, cut and printable."""
    return printable((str(error).splitlines() or [type(error).__name__])[0][:160])


def printable(text: str) -> str:
    """The text with what moves the cursor of a terminal, colours it or hides something written as \\x1b."""
    return text if text.isprintable() else "".join(map(_shown, text))


def few(names: list[str]) -> str:
    """Up to five names, those that could upset a terminal quoted, and how many more there are."""
    shown = [name if name.isprintable() and len(name) < 80 else repr(name[:80]) for name in names[:5]]
    return (", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "nothing"


_hints = cache(get_type_hints)
_KINDS = {str: "a text", bool: "true or false", int: "a whole number, not negative", float: "a number",
          tuple: "a list", dict: "a JSON object"}  # fmt: skip


def _shown(c: str) -> str:
    return c if c.isprintable() else c.encode("unicode_escape").decode()


def _refuse(where: str, content: Any, rule: str) -> NoReturn:
    raise ValueError(f"{where} ({printable(str(content)[:60])}) must {rule}.")


def _names_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):  # of which one reader takes the first, another the last
        raise ValueError(f"a name stands twice among {few(sorted(content))}")
    return content


def _number(text: str) -> int | float:
    number = int(text) if text.removeprefix("-").isdigit() else float(text)
    if not (math.isfinite(number) if isinstance(number, float) else -(1 << 63) <= number < 1 << 63):
        raise ValueError(f"{text[:40]} is not a number of 64 bits")
    return number


def hanging(text: str, margin: int) -> str:
    """Lines of at most WIDTH columns, broken between words; what goes on stands below the word at `margin`."""
    indent = " " * margin
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )


def progress(total: int, what: str, unit: str, initial: int = 0, shown: bool = True) -> tqdm[Any]:
    """A tqdm bar on stderr; in a log file it writes a line now and then instead of redrawing one."""
    from tqdm import tqdm  # here: most that read this file show none

    if not hasattr(tqdm, "_lock"):  # its own is a semaphore of all processes, which one that is ended would leave
        tqdm.set_lock(RLock())
    interactive = sys.stderr.isatty()
    return tqdm(
        disable=not shown,
        total=total,
        initial=initial,
        desc=what if len(what) <= MAX_WHAT else f"{what[: MAX_WHAT - 1]}…",
        unit=unit,
        unit_scale=unit == "cell",
        bar_format=WITHOUT_RATE if unit == "step" else None,  # whose rate is said in cells
        dynamic_ncols=interactive,
        mininterval=0.1 if interactive else 10,
        maxinterval=10,
    )
