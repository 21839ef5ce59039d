"""Attack the readers of files with mutated files: python -m tests.attack.fuzz [READER ...] --inputs N

Input i of a reader is always the same. Counts are added up in --state, from which the next run goes on; what went wrong
is kept there by its number and can be looked at again (READER --again I). Each reader works in a process that serves
many inputs, with limits of memory and of CPU time for each; it ends with one that takes more, and another goes on after
that. Right are: what was read, and what was refused in a few words, by an error that the command line catches.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

MEMORY = 512 << 20  # bytes that one input may take
SECONDS = 10  # of CPU
AT_ONCE = 5000  # inputs of each reader until the counts are written, and a new process begins
KEPT = 200  # of what went wrong, for each reader
RIGHT = ("read", "refused")
ENDED = {-signal.SIGPROF: "time", -signal.SIGALRM: "time", -signal.SIGKILL: "killed"}


@dataclass
class Found:
    """What came of the inputs of a reader: how often, and those that went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def note(self, i: int, kind: str, text: str) -> None:
        self.counts[kind] += 1
        if kind not in RIGHT:
            self.wrong.append({"i": i, "wrong": kind, "text": text})


def attack(seeds: Path, jobs: list[tuple[str, int, int]]) -> None:
    """In a process of its own: inputs `first` to `last` of each reader, with a line before each."""
    from tests.attack.readers import READERS

    work = Path(tempfile.mkdtemp(prefix="attack-", dir=seeds))
    for name, *_ in jobs:
        shutil.copytree(seeds / name, work / name)
        READERS[name].read(work / name, Random(0), {})  # what is imported late is imported now
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kind, text = "", ""
    for name, first, last in jobs:
        for i in range(first, last):
            print(json.dumps({"was": kind, "text": text, "name": name, "i": i}), flush=True)
            kind, text = one(name, work / name, i)
    print(json.dumps({"was": kind, "text": text, "name": "", "i": 0}), flush=True)
    shutil.rmtree(work)


def one(name: str, folder: Path, i: int) -> tuple[str, str]:
    """What came of input `i`, in words: read, refused, or what is wrong."""
    from tests.attack.readers import READERS

    reader, random = READERS[name], Random(f"{name} {i}")
    files = reader.change(folder, random)
    before = {file: (folder / file).read_bytes() for file in files}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, whatever library it is in
    signal.setitimer(signal.ITIMER_REAL, 60 * SECONDS)
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            reader.read(folder, random, before)
    except (ValueError, OSError, KeyError, FloatingPointError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        if re.search("allocate memory|Unable to allocate|MemoryError|bad_alloc|malloc of size", text):
            return "memory", text[:500]
        if not 10 < len(text) < 4000 or (isinstance(error, KeyError) and " " not in text):
            return "unclear", f"{type(error).__name__}: {text[:500]}\n{traceback.format_exc()[-1500:]}"
        return "refused", ""
    except BaseException as error:
        kind = "memory" if isinstance(error, MemoryError) else type(error).__name__
        return kind, traceback.format_exc()[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for file, content in before.items():
            (folder / file).write_bytes(content)
    return "read", ""


def run(seeds: Path, jobs: list[tuple[str, int, int]]) -> dict[str, Found]:
    """Inputs `first` to `last` of each reader; what came of them."""
    found = {name: Found() for name, *_ in jobs}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.attack.fuzz", "--child", str(seeds)]
    while jobs:
        name, at = "", 0
        with subprocess.Popen(
            [*command, json.dumps(jobs)], env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout or ():
                said = json.loads(line)
                if name:
                    found[name].note(at, said["was"], said["text"])
                name, at = said["name"], said["i"]
        if process.returncode == 0:
            break
        if not name or process.returncode > 0:
            raise RuntimeError(f"the attack itself broke down, at input {at} of {name or 'none'}; see above.")
        found[name].note(at, ENDED.get(process.returncode, f"signal {-process.returncode}"), "")
        place = [job[0] for job in jobs].index(name)
        jobs = [(name, at + 1, jobs[place][2]), *jobs[place + 1 :]]
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        attack(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    from tests.attack.readers import READERS, write_seeds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"some of {', '.join(READERS)}; all by default")
    parser.add_argument("--inputs", type=int, default=1000, help="of each reader (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=Path("attack.json"), help="(default: %(default)s)")
    parser.add_argument("--again", type=int, metavar="I", help="only this input of one reader, and what comes of it")
    arguments = parser.parse_args()
    readers = arguments.readers or list(READERS)
    state = json.loads(arguments.state.read_text()) if arguments.state.exists() else {}
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        seeds = Path(folder)
        write_seeds(seeds, *readers)
        if arguments.again is not None:
            print(*one(readers[0], seeds / readers[0], arguments.again), sep="\n")
            return
        for begun in range(0, arguments.inputs, AT_ONCE):
            n = min(AT_ONCE, arguments.inputs - begun)
            first = {name: state.get(name, {"inputs": 0})["inputs"] for name in readers}
            for name, found in run(seeds, [(name, i, i + n) for name, i in first.items()]).items():
                of = state.setdefault(name, {"inputs": 0, "counts": {}, "wrong": []})
                of["inputs"] += n
                of["counts"] = dict(Counter(of["counts"]) + found.counts)
                of["wrong"] = [*of["wrong"], *found.wrong][:KEPT]
            arguments.state.write_text(json.dumps(state, indent=1))
    for name in readers:
        print(f"{name:<10} {state[name]['inputs']:>9,} inputs in all: {state[name]['counts']}")


if __name__ == "__main__":
    main()
