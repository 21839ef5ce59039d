import ast
import subprocess
import sys
from pathlib import Path

import pytest

import perturbdiff

PACKAGE = Path(perturbdiff.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "__main__", "cli", "app", "training", "evaluation", "inference", "model", "generation", "reference", "hub", "means",
    "diffusion", "nn", "atlas", "features", "data", "cards", "hub_client", "config", "lock", "workers", "files",
    "_version",
]  # fmt: skip
CODE_LOADERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def room(module: str) -> str:
    """perturbdiff.data.screen -> data."""
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    return ".".join(["perturbdiff", *path.relative_to(PACKAGE).with_suffix("").parts])


def imported(tree: ast.AST, module: str) -> list[str]:
    """Every module that is imported anywhere in a source: at its top, in functions, for type checkers."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from . import x
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            found += [f"{base}.{alias.name}" for alias in node.names] if base == "perturbdiff" else [base]
    return found


def upward_imports(source: str, module: str) -> list[str]:
    """Imports of rooms above the module's own."""
    own = ORDER.index(room(module))
    names = [name for name in imported(ast.parse(source), module) if name.split(".")[0] == "perturbdiff"]
    return [name for name in names if room(name) in ORDER and ORDER.index(room(name)) < own]


def names_of(node: ast.expr) -> str:
    """The dotted text of a name or attribute, "" for anything else."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def forbidden(source: str) -> list[str]:
    """What would run code of a stranger: unpicklers, eval and exec, torch.load, a shell."""
    tree = ast.parse(source)
    found = [name for name in imported(tree, "perturbdiff.x") if name.split(".")[0] in CODE_LOADERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = names_of(node.func)
            if name in (
                "eval",
                "exec",
                "compile",
                "__import__",
                "builtins.eval",
                "builtins.exec",
                "os.system",
                "os.popen",
            ):
                found.append(name)
            if name.endswith(("read_pickle", "yaml.load", "unsafe_load")):
                found.append(name)
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("shell", "allow_pickle") and not allowed:
                    found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
        elif isinstance(node, ast.Attribute) and names_of(node) == "torch.load":
            found.append("torch.load")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name == "load"]
    return found


def test_every_module_has_a_room():
    rooms = {room(module_of(path)) for path in SOURCES} - {"__init__"}
    assert rooms == set(ORDER)


def test_every_folder_of_modules_is_a_package():
    # A folder without __init__.py imports in a checkout and is missing from a wheel.
    assert {path.parent for path in SOURCES} == {path.parent for path in SOURCES if path.name == "__init__.py"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=module_of)
def test_imports_point_down_the_rooms(path):
    assert upward_imports(path.read_text(), module_of(path)) == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py" and p.parent != PACKAGE], ids=module_of)
def test_rooms_export_nothing_by_themselves(path):
    assert path.read_text().strip() == ""


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_unpickles_evaluates_or_opens_a_shell(path):
    assert forbidden(path.read_text()) == []


def test_the_search_for_upward_imports_finds_hidden_ones():
    source = (
        "def f():\n    from perturbdiff import cli\n    import perturbdiff.training.loop\n    from . import screen\n"
    )
    source += "    from ..evaluation import report\n    from perturbdiff import __version__\n"
    assert upward_imports(source, "perturbdiff.data.splits") == [
        "perturbdiff.cli",
        "perturbdiff.training.loop",
        "perturbdiff.evaluation",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "def f():\n  from pickle import loads", "import numpy, dill as d", "eval('1')", "exec(x)",
        "torch.load(p)", "loader = torch.load", "from torch import load", "subprocess.run(x, shell=True)",
        "np.load(x, allow_pickle=flag)", "os.system('ls')", "yaml.load(x)", "pd.read_pickle(x)", "__import__(x)",
    ],
)  # fmt: skip
def test_the_search_for_forbidden_calls_finds_them(line):
    assert forbidden(line)


@pytest.mark.parametrize("line", ["model.eval()", "np.load(x, allow_pickle=False)", "re.compile(x)", "torch.save(x)"])
def test_the_search_for_forbidden_calls_leaves_others_alone(line):
    assert forbidden(line) == []


@pytest.mark.parametrize("argv", [None, ["--help"], ["train", "--help"], ["--version"]])
def test_help_does_not_wait_for_heavy_libraries(argv):
    called = (
        f"from perturbdiff.cli.main import main\ntry: main({argv})\nexcept SystemExit as stop: assert not stop.code"
    )
    check = "import sys\nheavy = {'torch', 'anndata', 'pandas', 'scipy', 'accelerate'} & set(sys.modules)"
    code = f"{called if argv else 'import perturbdiff'}\n{check}\nassert not heavy, heavy"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_predictions_rankings_and_scores_do_not_wait_for_the_statistics_of_scipy():
    """A third of what a command imports; of it they need the draws of populations alone."""
    modules = ("inference.predictions", "inference.ranking", "evaluation.scores", "training.run")
    code = (
        "".join(f"import perturbdiff.{module}\n" for module in modules)
        + "import sys\nprint('scipy.stats' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


def test_the_package_has_what_its_list_says_and_nothing_else():
    assert dir(perturbdiff) == sorted(perturbdiff.__all__)
    for name in perturbdiff.__all__:
        assert getattr(perturbdiff, name).__doc__, name
        assert name in perturbdiff.__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'PerturbDif'"):
        perturbdiff.PerturbDif  # noqa: B018


def imports_of_files() -> dict[str, set[str]]:
    """Which modules each module imports, also for type checkers and within functions."""
    modules = {module_of(path).removesuffix(".__init__") for path in SOURCES}
    arrows = {}
    for path in SOURCES:
        module = module_of(path)
        tree = ast.parse(path.read_text())
        names = imported(tree, module)
        names += [  # from perturbdiff.data import screen
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        ]
        arrows[module.removesuffix(".__init__")] = {name for name in names if name in modules} - {"perturbdiff"}
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none if there is no such circle."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for other in sorted(arrows.get(module, ())):
                if found := visit(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := visit(module, []))), [])


def test_no_modules_import_each_other_in_a_circle():
    assert circle(imports_of_files()) == []


def test_the_search_for_circles_finds_one():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_tree_in_contributing_is_the_tree():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    lines = text.split("```\nperturbdiff/\n")[1].split("\nrecipes/")[0].splitlines()
    folders, listed = [""] * 9, set()
    for line in lines:
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth] = folders[depth - 1] + name if name.endswith("/") else ""
        if not name.endswith("/"):
            listed.add(folders[depth - 1] + name)
    assert listed == {str(path.relative_to(PACKAGE)) for path in SOURCES if path.name != "__init__.py"}
