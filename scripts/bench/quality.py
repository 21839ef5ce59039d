"""How good predictions of held-out conditions are on public screens, beside simple methods and the ceiling.

    python scripts/bench/quality.py --data DIR --out DIR --tasks zhao_PW040,papalexi_rep_3 --seeds 0,1,2
    python scripts/bench/quality.py --data DIR --out DIR --set optim.lr=1e-3 --label fast    # other settings beside
    python scripts/bench/quality.py --data DIR --out DIR --predictions scgen='{task}_{seed}.h5ad'    # another tool

A task is a file of scripts/bench/tasks: the screen (a file of --data), how it is read, what is held out, the recipe,
and how often anybody looked at its test cells. --tasks also takes paths of such files. Each task, method and seed has a
folder OUT/TASK/LABEL/SEED; its run/ is a run folder of `perturbdiff train`. What was killed goes on with the same
command, and what is finished does not run again while screen, task, recipe and settings are the same; after a change
of code give another --out.

Predictions of other tools are .h5ad files: X log1p, normalised as the task's settings say, obs perturbation, cell_type,
batch, of the cells that OUT/TASK/split.json holds out (--splits writes it).

Every run is a look at test cells: add a sentence to looked_at of its task. Settings are chosen without one by --fold,
which holds out training conditions and drops the task's own test cells:

    python scripts/bench/quality.py --data DIR --out FOLDS --tasks kang_B --fold IFN-beta:NK --set optim.lr=1e-3 \\
      --label fast

--choose gives no recipe, so that `perturbdiff train` chooses one.

Prints a Markdown table of what is finished of the tasks and puts it into OUT/quality.json. Scores are means over
conditions and seeds, with 95 % intervals: over conditions where there are five or more, else over cells; both with the
spread of the seeds where there are several. The best simple method is chosen by the test cells, in its favour; the
verdict counts conditions. CPU-seconds (mean) and memory (peak) are those of the training process, of one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from perturbdiff.config import find_recipe, load_config
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import make_split, write_split
from perturbdiff.evaluation.doubt import COMPARED
from perturbdiff.evaluation.fair import CONDITION
from perturbdiff.evaluation.scores import CEILING, MODEL, Scores, evaluate
from perturbdiff.files import few, write_json
from perturbdiff.training.run import simulated_screen

TASKS = Path(__file__).parent / "tasks"
SIMULATED = "simulated"  # in place of a file: the screen of `perturbdiff demo`
SHOWN = ("pearson_delta", "energy_distance")


@dataclass(frozen=True)
class Task:
    """A screen and what is held out of it.

    file, loadings
        Names in the folder of data; loadings of genes in the cells of the second one describe perturbations.
    hold_out, split
        Selectors as of --hold-out, or the name of a split file in the folder of data.
    settings
        key=value words of reading and training, which win over the recipe.
    looked_at
        Who scored the test cells before, and why; a sentence a time.
    """

    name: str
    file: str
    source: str
    recipe: str
    hold_out: list[str] = field(default_factory=list)
    split: str | None = None
    drop: list[str] = field(default_factory=list)
    loadings: str | None = None
    settings: list[str] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, name: str) -> Task:
        path = Path(name) if name.endswith(".yaml") else TASKS / f"{name}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"there is no task {name!r}; there are {', '.join(task_names())}.")
        given, known = yaml.safe_load(path.read_text()), {of.name: of for of in fields(cls) if of.name != "name"}
        if not isinstance(given, dict) or (unknown := sorted(map(str, {*given} - {*known}))):
            has = few(unknown) if isinstance(given, dict) else "no keys"
            raise ValueError(f"{path} has {has}; the keys of a task are {', '.join(known)}.")
        if missing := {"file", "source", "recipe"} - {*given}:
            raise ValueError(f"{path} lacks {few(sorted(missing))}.")
        for key, value in given.items():
            texts = value if str(known[key].type).startswith("list") else [value]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                kind = "a text" if texts is not value else "a list of texts"
                raise ValueError(f"{path}: {key} ({value!r}) must be {kind}.")
        if bool(given.get("hold_out")) == bool(given.get("split")):
            raise ValueError(f"{path} must have hold_out or split, and not both.")
        return cls(path.stem, **given)

    def without_test_cells(self, fold: Sequence[str]) -> Task:
        """Its training conditions of `fold` held out instead."""
        if self.split is not None:
            raise ValueError(f"--fold needs hold_out in the task; {self.name} has a split file.")
        name = re.sub(r"[^\w.+-]+", "_", f"{self.name}_fold_{'_'.join(fold)}")
        return replace(self, name=name, hold_out=list(fold), drop=[*self.drop, *self.hold_out], looked_at=[])


def task_names() -> list[str]:
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


@dataclass(frozen=True)
class Bench:
    """The task on this machine: paths, and the words with which it is read and trained."""

    task: Task
    data: Path
    out: Path

    def path(self, name: str | None) -> Path:
        if name == SIMULATED:
            return simulated_screen(self.out / self.task.name)
        if not (path := self.data / str(name)).is_file():
            raise FileNotFoundError(f"task {self.task.name} needs {name}, which is not in --data {self.data}.")
        return path

    def words(self) -> list[str]:
        dropped = [f"data.drop={json.dumps(self.task.drop)}"] if self.task.drop else []
        split = [f"split.file={self.path(self.task.split)}"] if self.task.split else []
        return [*dropped, *split, *self.task.settings]

    def identity(self) -> dict[str, Any]:
        """What scores depend on besides the method."""
        task, used = self.task, {"screen": self.path(self.task.file), "recipe": find_recipe(self.task.recipe, "train")}
        used |= {key: self.path(name) for key in ("split", "loadings") if (name := getattr(task, key))}
        kept = {key: value for key, value in asdict(task).items() if key not in ("source", "looked_at", "name")}
        return {**kept, "sha256": {name: sha256(path) for name, path in used.items()}}

    def write_split(self) -> Path:
        """The held-out cells, for tools that are not ours."""
        path, split = self.path(self.task.file), {"hold_out": self.task.hold_out}
        given = {"out": "unused", "data": {"screen": str(path)}, "split": split}
        config = load_config(find_recipe(self.task.recipe, "train"), self.words(), given)
        screen = Screen.read(path, config.data)
        path = self.out / self.task.name / "split.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_split(make_split(screen, config.split, config.training.seed), screen, path)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(), metavar="DIR", help="folder of the screens")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results")
    parser.add_argument("--tasks", metavar="A,B", help=f"files, or of {', '.join(task_names())} (default: these)")
    parser.add_argument("--seeds", default="0", metavar="0,1,2", help="(default: %(default)s)")
    more = {"action": "append", "default": []}
    parser.add_argument("--set", **more, metavar="KEY=VALUE", help="a setting that wins over the tasks'; needs --label")
    parser.add_argument("--label", metavar="NAME", help=f"name of these settings in the table (default: {MODEL})")
    parser.add_argument("--predictions", **more, metavar="NAME=FILE", help="score these, train nothing")
    parser.add_argument("--fold", **more, metavar="SELECTOR", help="hold out these training conditions instead")
    parser.add_argument("--choose", action="store_true", help="without the task's recipe; needs --label")
    parser.add_argument("--splits", action="store_true", help="write OUT/TASK/split.json, run nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other count as CPU-seconds
    try:
        failed = run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (FileNotFoundError, ValueError, KeyError) as error:
        sys.exit(f"quality.py: error: {error.args[0] if isinstance(error, KeyError) else error}")
    if failed:
        sys.exit("quality.py: " + "; ".join(failed))


def run(options: argparse.Namespace) -> list[str]:
    """Everything asked for; returns what failed."""
    tasks = [Task.read(name) for name in (options.tasks.split(",") if options.tasks else task_names())]
    if options.out is None:
        raise ValueError("--out is missing: the folder of results.")
    if (options.set or options.choose) and (options.label or MODEL) == MODEL:
        raise ValueError("--set and --choose need --label NAME: what these settings are called in the table.")
    methods = dict(given.partition("=")[::2] for given in options.predictions)
    for name, file in (methods or {options.label or MODEL: "none"}).items():
        if not re.fullmatch(r"[\w+-][\w.+-]*", name) or not file or (methods and name == MODEL):
            raise ValueError(f"{name!r}: give NAME of letters, digits, '.+-_', not {MODEL}, for predictions NAME=FILE.")
    methods = methods or {options.label or MODEL: ""}
    if options.fold:
        tasks = [task.without_test_cells(options.fold) for task in tasks]
    benches = [Bench(task, options.data, options.out) for task in tasks]
    identities = [bench.identity() for bench in benches]  # a missing file is told before anything runs
    if options.splits:
        print("\n".join(str(bench.write_split()) for bench in benches))
        return []
    failed, seeds = [], [int(seed) for seed in options.seeds.split(",")]
    for bench, identity in zip(benches, identities, strict=True):
        for name, file in methods.items():
            for seed in seeds if not file or "{seed}" in file else seeds[:1]:
                folder = bench.out / bench.task.name / name / str(seed)
                path = file.format(task=bench.task.name, seed=seed)
                made_of = {"task": identity, "seed": seed, "settings": [*["chosen"] * options.choose, *options.set]}
                made_of |= {"predictions": sha256(Path(path))} if file else {}
                if finished(folder, made_of):
                    continue
                print(f"{bench.task.name}, {name}, seed {seed}", file=sys.stderr, flush=True)
                if file:
                    score(bench, path, folder / "run")
                elif why := train(bench, folder, [*options.set, f"training.seed={seed}"], options.choose):
                    failed.append(f"{bench.task.name}, {name}, seed {seed}: {why}")
    records = [found for pair in zip(benches, identities, strict=True) for found in results(*pair)]
    path, asked = options.out / "quality.json", {task.name for task in tasks}
    others = [of for of in json.loads(path.read_text()) if of["task"] not in asked] if path.is_file() else []
    write_json(path, sorted(others + records, key=lambda of: of["task"]))
    print(json.dumps(records, indent=1) if options.json else table(records))
    return failed


def finished(folder: Path, made_of: dict[str, Any]) -> bool:
    """Whether its scores are there; refuses a folder that something else was made in."""
    record = folder / "made_of.json"
    if record.is_file() and (then := json.loads(record.read_text())) != made_of:
        differ = sorted(key for key in {**then, **made_of} if then.get(key) != made_of.get(key))
        raise ValueError(f"{folder} was made with another {few(differ)}; give another --out or --label, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, made_of)
    return (folder / "run" / "scores.json").is_file()  # which is written after scores.parquet


def train(bench: Bench, folder: Path, settings: list[str], choose: bool) -> str | None:
    """Train, then predict and score in a process of its own; returns why there are no scores."""
    task, run_folder, log = bench.task, folder / "run", folder / "log.txt"
    program, words = [sys.executable, "-m", "perturbdiff"], bench.words()
    if task.loadings is not None:
        features = bench.out / task.name / "loadings.parquet"
        command = [*program, "features", "build", bench.path(task.loadings), "--out", features]
        if not features.is_file() and call(command, log):
            return f"no loadings, see {log}"
        words.append(f"data.perturbation_features={json.dumps([str(features)])}")
    command = [*program, "train", "--screen", bench.path(task.file), "--out", run_folder]
    command += [] if choose else ["--recipe", task.recipe]
    command += [word for selector in task.hold_out for word in ("--hold-out", selector)]
    settings = [*words, "training.trackers=[]", *settings]
    if call([*command, "--no-score", *settings], log, folder / "cost.json"):
        return f"training failed, see {log}"
    if (run_folder / "stopped.json").is_file():
        return "a signal stopped it; the same command goes on"
    return f"scoring failed, see {log}" if call([*command, *settings], log) else None


def call(command: Sequence[str | Path], log: Path, cost: Path | None = None) -> int:
    """Exit status of a program, whose output goes to one file and what it cost to another. Ends it before ending."""
    spent = attempts(cost)
    if cost is not None:
        write_json(cost, [*spent, None])  # stays where this process is killed too
    with log.open("a") as text:
        child = subprocess.Popen(list(map(str, command)), stdout=text, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except (KeyboardInterrupt, SystemExit):
            child.terminate()  # it saves
            _, status, usage = os.wait4(child.pid, 0)
            raise
        finally:
            child.returncode = os.waitstatus_to_exitcode(status)
            used = {"cpu_s": round(usage.ru_utime + usage.ru_stime, 1), "peak_gb": round(usage.ru_maxrss / 2**20, 2)}
            if cost is not None:
                write_json(cost, [*spent, used])
    return child.returncode


def attempts(cost: Path | None) -> list[dict[str, float] | None]:
    """What each attempt to train cost; None of one that was killed."""
    return json.loads(cost.read_text()) if cost is not None and cost.is_file() else []


def score(bench: Bench, predicted: str, out: Path) -> None:
    """Score what another tool predicted."""
    scores = evaluate(predicted, bench.path(bench.task.file), bench.write_split(), overrides=bench.words())
    out.mkdir(parents=True, exist_ok=True)
    scores.save(out)


def results(bench: Bench, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """A record a method of all that is finished of a task as it is now; ours first."""
    runs: dict[tuple[bool, str, str], list[tuple[int, Path]]] = {}
    for path in (bench.out / bench.task.name).glob("*/*/run/scores.json"):
        folder = path.parents[1]
        made_of = json.loads((folder / "made_of.json").read_text())
        if made_of["task"] == identity:
            name = folder.parent.name
            key = (name != MODEL, name, json.dumps(made_of["settings"]))
            runs.setdefault(key, []).append((made_of["seed"], folder))
    return [record(bench.task, name, json.loads(words), sorted(of)) for (_, name, words), of in sorted(runs.items())]


def record(task: Task, name: str, settings: list[str], runs: list[tuple[int, Path]]) -> dict[str, Any]:
    saved = json.loads((runs[0][1] / "run" / "scores.json").read_text())
    model = saved["model"]  # of another tool's predictions not ours
    scores = over_seeds([pd.read_parquet(folder / "run" / "scores.parquet") for _, folder in runs], model)
    means, version = scores.means(), saved["library_version"]
    found: dict[str, Any] = {"task": task.name, "method": name, "settings": settings, "version": version}
    found |= {"seeds": [seed for seed, _ in runs], "n_conditions": scores.n_conditions}
    for metric in SHOWN:
        best, verdict = scores.compared(metric) or (None, {})
        column = {method: rounded(mean) for method, mean in means[metric].items()}
        own, ceiling = column.pop(model), column.pop(CEILING)
        found[metric] = {"mean": own, "interval": scores.interval(model, metric), "ceiling": ceiling}
        gain, (low, high) = scores.difference(metric) or (None, (None, None))
        over_all = [None if number is None else round(number, 4) for number in (gain, low, high)]
        found[metric] |= {"best_simple": best, "verdict": verdict, "gain": over_all, "simple": column}
    spent = [attempts(folder / "cost.json") for _, folder in runs]
    known = [[attempt for attempt in of if attempt] for of in spent]
    found["variance_ratio"] = rounded(means["variance_ratio"][model])
    found["cpu_s"] = round(sum(a["cpu_s"] for of in known for a in of) / len(runs), 1) if any(known) else None
    found["cpu_s_at_least"] = any(None in of for of in spent)  # an attempt was killed before it could say
    found["peak_gb"] = max((a["peak_gb"] for of in known for a in of), default=None)
    return found | {"looks": len(task.looked_at), "looked_at": task.looked_at}


def over_seeds(tables: list[pd.DataFrame], model: str) -> Scores:
    """Scores whose means are those over seeds; errors are those over cells and, of `model`, over seeds."""
    first, *others = [of.set_index(["method", *CONDITION]) for of in tables]
    if not others:
        return Scores(tables[0], model=model)
    values = np.stack([first.to_numpy(float), *(of.reindex(first.index).to_numpy(float) for of in others)])
    mean = pd.DataFrame(values.mean(axis=0), first.index, first.columns)
    noise = pd.DataFrame(values.var(axis=0, ddof=1) / len(values), first.index, first.columns).loc[model]
    for metric in COMPARED:  # cells are the same for all seeds, so their error stays
        of_seeds = noise[metric].reindex(first.index.droplevel("method")).to_numpy()
        own = (first.index.get_level_values("method") == model).astype(float)
        for name, added in ((f"error {metric}", of_seeds * own), (f"difference error {metric}", of_seeds)):
            mean[name] = np.sqrt(mean[name] ** 2 + added)
    return Scores(mean.reset_index(), model=model)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, a row a task and method."""
    shown = ["task", "method", "seeds"]
    for metric in SHOWN:
        shown += [f"{metric} [95 %]", "best simple", "ceiling", "verdict"]
    lines = [[*shown, "variance ratio", "CPU-s", "peak GB", "looks"]]
    lines.append(["---"] * len(lines[0]))
    for found in records:
        row = [found["task"], found["method"], ", ".join(map(str, found["seeds"]))]
        for metric in SHOWN:
            of = found[metric]
            interval = "" if of["interval"] is None else " [{:.3f}, {:.3f}]".format(*of["interval"])
            best = of["best_simple"]
            counts = {word: f" on {n}" * (found["n_conditions"] > 1) for word, n in of["verdict"].items() if n}
            row += [f"{text(of['mean'])}{interval}", f"{text(of['simple'][best])} {best}" if best else "none"]
            gain, low, high = of["gain"]
            over_all = "" if gain is None else f"; gain {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
            row += [text(of["ceiling"]), ", ".join(word + on for word, on in counts.items()) + over_all]
        row += [text(found["variance_ratio"], 2), "at least " * found["cpu_s_at_least"] + text(found["cpu_s"], 0)]
        row += [text(found["peak_gb"], 2), str(found["looks"])]
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def text(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
