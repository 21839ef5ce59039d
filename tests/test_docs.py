"""README and docs: every block of code runs as printed, from a wheel, in one folder, page after page.

A block is ```bash or ```python, and the comment on the line before it says how it is run:

run      as it stands
hub      likewise, with a Hub on this machine in place of the one on the internet
cluster  likewise, with stand-ins for the commands of a cluster, and for the processes that it would start
data     not at all, but parsed: it needs the internet or a file that nobody may pass on (five of them at most)

A ```text block behind one shows lines of what it prints: words as they are, numbers as they come, ... for the rest.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from perturbdiff.cli.main import _arguments
from tests.localhub.server import LocalHub
from tests.recipes.test_launch import SCONTROL, SRUN

ROOT = Path(__file__).parents[1]
# In the order in which they are read; a page may use what those before it made.
NAMES = ("start", "screen", "download", "finetune", "unseen", "pretrain", "publish", "quality", "method", "api", "faq")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
TAG = re.compile(r"<!-- (run|hub|cluster|data) -->\n?")


@dataclass(frozen=True)
class Block:
    where: str  # file:line
    tag: str | None
    language: str
    code: str
    output: str | None = None  # the text that follows it


def blocks_of(text, name="page"):
    """The blocks of code of a page; directives of the site and what is only read are none."""
    found = []
    tokens = [
        t for t in MarkdownIt().enable("table").parse(text) if t.type in ("fence", "html_block", "paragraph_open")
    ]
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "fence" or token.info.startswith("{"):
            continue
        language = token.info.strip()
        if language == "text":
            found[-1] = Block(*[getattr(found[-1], f) for f in ("where", "tag", "language", "code")], token.content)
            continue
        adjacent = before is not None and before.type == "html_block" and before.map[1] == token.map[0]
        tag = TAG.fullmatch(before.content) if adjacent else None
        found.append(Block(f"{name}:{token.map[0] + 1}", tag and tag[1], language, token.content))
    return found


BLOCKS = [block for path in PAGES for block in blocks_of(path.read_text(), str(path.relative_to(ROOT)))]


def test_a_tag_counts_right_before_its_block_and_text_behind_one_is_what_it_prints():
    text = (
        "<!-- run -->\n```bash\na\n```\nprints\n```text\nb\n```\n<!-- hub -->\n\n```bash\nc\n```\n```python\nd\n```\n"
        "```{note}\nno code\n```\n"
    )
    assert [(b.where, b.tag, b.language, b.code, b.output) for b in blocks_of(text)] == [
        ("page:2", "run", "bash", "a\n", "b\n"), ("page:11", None, "bash", "c\n", None),
        ("page:14", None, "python", "d\n", None),
    ]  # fmt: skip


def test_every_page_is_read_and_every_block_says_how_it_runs():
    assert sorted((ROOT / "docs").glob("*.md")) == sorted([*PAGES[1:], ROOT / "docs" / "index.md"])
    assert blocks_of((ROOT / "docs" / "index.md").read_text()) == []
    assert [block.where for block in BLOCKS if block.tag is None or block.language not in ("bash", "python")] == []
    assert [block.where for block in BLOCKS if max(map(len, block.code.splitlines())) > 82] == []  # none scrolls
    assert len(BLOCKS) > 30
    assert sum(block.tag == "data" for block in BLOCKS) <= 5


def test_the_counts_of_the_readme_are_those_of_the_table():
    table = re.search(r"\n\| held out \|.*?\n\n", (ROOT / "docs" / "quality.md").read_text(), re.DOTALL)[0]
    rows = [line.split("|") for line in table.strip().splitlines()[2:]]
    delta, energy = ([word.strip() for row in rows for word in row[i].split(",")] for i in (-3, -2))
    numbers = re.search(r"On (\d+) hold-outs .*?\. W", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    counted = [len(rows), *(words.count(word) for words in (energy, delta) for word in ("better", "worse", "n.d."))]
    assert [int(n) for n in re.findall(r"\d+", numbers)] == counted


def commands(code):
    """The words of each command of ours in a script."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["perturbdiff"]:
            yield words[1:]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.tag == "data"], ids=lambda b: b.where)
def test_a_block_that_cannot_run_here_parses(block):
    if block.language == "python":
        ast.parse(block.code)
        return
    assert subprocess.run(["bash", "-n", "-c", block.code], check=False).returncode == 0
    for words in commands(block.code):
        _arguments(words)
    for script in re.findall(r"bash (\S+)", block.code):
        assert (ROOT / script).is_file()


# sbatch runs the job at once, srun and scontrol are those of the tests of job scripts; no process of a run is started.
SBATCH = """#!{python}
import os, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
script, *words = [word for word in sys.argv[1:] if not word.startswith("--")]
nodes = dict(option[2:].split("=", 1) for option in options if "=" in option).get("nodes", "1")
given = {{"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node[1-1999]", "SLURM_JOB_NUM_NODES": nodes,
          "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "SLURM_MEM_PER_NODE": "3000"}}
print("Submitted batch job 1", flush=True)
sys.exit(subprocess.run(["bash", script, *words], env={{**os.environ, **given}}).returncode)
"""
ACCELERATE = """#!{python}
import os, sys
if os.environ["SLURM_NODEID"] != "0":
    sys.exit()
from accelerate.commands.config.config_args import load_config_from_file
from perturbdiff.cli.main import _arguments
from perturbdiff.config import find_recipe, load_config
load_config_from_file(sys.argv[sys.argv.index("--config_file") + 1])
words = sys.argv[sys.argv.index("perturbdiff") + 1 :]
arguments = _arguments(words)
load_config(find_recipe(arguments.recipe, "pretrain"), arguments.settings)
"""
COMMAND = """#!{python}
from perturbdiff.cli.main import main
if __name__ == "__main__":  # processes that it starts read this file
    main()
"""


@pytest.fixture
def stranger(tmp_path):
    """A folder of somebody who installed a wheel and has nothing else, and the environment of their shell."""
    source, built = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "perturbdiff", "recipes"):
        (source / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", built]
    subprocess.run([*build, source], check=True, capture_output=True)
    with zipfile.ZipFile(*built.iterdir()) as wheel:
        wheel.extractall(tmp_path / "site")
    for folder, made in (("bin", {"perturbdiff": COMMAND}), ("cluster", CLUSTER)):
        (tmp_path / folder).mkdir()
        for name, text in made.items():
            (tmp_path / folder / name).write_text(text.format(python=sys.executable))
            (tmp_path / folder / name).chmod(0o755)
    folder = tmp_path / "here"
    folder.mkdir()
    path = f"{tmp_path / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ, "PATH": path, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "80", "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }  # fmt: skip
    return folder, environment


CLUSTER = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}


def as_printed(text):
    """Lines without their numbers and spaces, which are of a machine and of its rounding."""
    return [" ".join(re.sub(r"[-+]?\d[\d.,]*", "N", line).split()) for line in text.splitlines()]


def stands_for(shown):
    """Whether a printed line is the one that is shown, up to "..." at its end."""
    return lambda line: line.startswith(shown[:-3]) if shown.endswith("...") else line == shown


@pytest.mark.slow
def test_every_block_runs_as_printed_from_a_wheel_in_one_folder(stranger):
    folder, environment = stranger
    with LocalHub(redirects=True, write_token="hf_local") as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_local",
                  "NO_PROXY": "127.0.0.1,localhost"}  # fmt: skip
        cluster = {"PATH": f"{folder.parent / 'cluster'}{os.pathsep}{environment['PATH']}"}
        extra = {"run": {}, "hub": online, "cluster": cluster}
        for block in BLOCKS:
            if block.tag == "data":
                continue
            shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*shell, block.code], cwd=folder, env=environment | extra[block.tag], capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block.where}\n{block.code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            if block.output is not None:
                printed = as_printed(done.stdout)
                missing = [line for line in as_printed(block.output) if not any(map(stands_for(line), printed))]
                assert missing == [], f"{block.where} does not print these lines, but\n{done.stdout}"


@pytest.mark.slow
def test_the_notebooks_run_and_are_committed_with_what_they_give(tmp_path):
    pytest.importorskip("nbclient", reason="pip install -e '.[docs]'")
    command = [sys.executable, ROOT / "docs" / "execute.py", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for committed in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        old, new = (json.loads(path.read_text())["cells"] for path in (committed, tmp_path / committed.name))
        assert [kinds_of(cell) for cell in old] == [kinds_of(cell) for cell in new]


def kinds_of(cell):
    """What a cell of a notebook gave: text, figures."""
    return [sorted(output.get("data", {"text": 0})) for output in cell.get("outputs", ())]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("myst_nb", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "E|x-y|" in (tmp_path / "site" / "api.html").read_text()
    assert (tmp_path / "site" / "method.html").is_file()
