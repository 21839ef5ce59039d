"""What ships for reading: `recipes` lists and prints them, `settings` prints every setting."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
from dataclasses import is_dataclass
from itertools import groupby, takewhile
from typing import Any, Literal, get_args, get_origin, get_type_hints

from perturbdiff.cli.command import add_command


def add_settings_commands(commands: Any) -> None:
    """Declare them."""
    recipes = add_command(
        commands, "recipes", _recipes, "the recipes that ship: list them, print one",
        "Lists the recipes, launch files and job scripts that come with perturbdiff, or prints one, to be copied and\n"
        "changed. The name of a recipe works wherever the path of one does; its folder may be left out where the\n"
        "command says which is meant.",
        "examples:\n  perturbdiff recipes\n  perturbdiff recipes train/cross_cell_type > mine.yaml\n"
        "  perturbdiff train --screen kang.h5ad --out runs/kang --recipe cross_cell_type\n",
    )  # fmt: skip
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print this one, as train/cross_cell_type")

    settings = add_command(
        commands, "settings", _settings, "every setting with its default and what it means",
        "Prints all settings of a training, or those of one section, as yaml that is a recipe itself. Words after #\n"
        "say what a setting means and which values it may have.",
        "examples:\n  perturbdiff settings\n  perturbdiff settings training\n"
        "  perturbdiff settings atlas                 of `perturbdiff atlas build`\n",
    )  # fmt: skip
    settings.add_argument("section", nargs="?", metavar="SECTION", help="data, denoiser, training, ...; or atlas")


def _recipes(arguments: argparse.Namespace) -> None:
    from perturbdiff.config import RECIPES, find_recipe, list_recipes
    from perturbdiff.files import hanging

    if arguments.name is not None:
        print(find_recipe(arguments.name).read_text(), end="")
        return
    for _, group in groupby(list_recipes(), key=lambda recipe: recipe[2].parent):
        print("\n".join(f"{name}\n{hanging(f'    {about}', 4)}" for name, about, _ in group), end="\n\n")
    print(f"perturbdiff recipes NAME prints one; all are in\n{RECIPES}")


def _settings(arguments: argparse.Namespace) -> None:
    from perturbdiff.config import BuildConfig, Config

    section, hints = arguments.section, get_type_hints(Config)
    sections = {name: schema for name, schema in hints.items() if _is_section(schema)}
    if section is None or section == "atlas":
        print("\n".join(settings_lines(BuildConfig if section else Config)))
    elif section in sections:
        print("\n".join([f"{section}:", *("  " + line for line in settings_lines(sections[section]))]))
    else:
        near = difflib.get_close_matches(section, [*sections, "atlas"], 1)
        likely = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"section {section!r} must be one of {', '.join([*sections, 'atlas'])}{likely}")


def settings_lines(schema: type) -> list[str]:
    """The defaults of a settings dataclass as yaml, with choices and the comments of its source.

    What a list or a null may hold follows it, commented out.
    """
    import yaml  # type: ignore[import-untyped]

    from perturbdiff.config import as_dict

    lines: list[str] = []
    source = inspect.getsource(schema).splitlines()
    defaults, hints = as_dict(schema), get_type_hints(schema)
    for node in ast.walk(ast.parse("\n".join(source))):
        if not isinstance(node, ast.AnnAssign):
            continue
        name, end = ast.unparse(node.target), node.end_lineno or node.lineno
        inner = [part for part in _parts(hints[name]) if _is_section(part)]
        comment = source[end - 1].encode()[node.end_col_offset :].decode().strip().removeprefix("# ")
        choices = [" | ".join(get_args(part)) for part in _parts(hints[name]) if get_origin(part) is Literal]
        comment = "; ".join(filter(None, [*choices, comment]))
        above = takewhile(lambda line: line.startswith("#"), map(str.strip, reversed(source[: node.lineno - 1])))
        lines += reversed(list(above))
        filled = isinstance(defaults[name], dict)
        value = "" if filled else " " + yaml.safe_dump(defaults[name], default_flow_style=True).splitlines()[0]
        lines.append(f"{name}:{value}" + (f"  # {comment}" if comment else ""))
        for part in inner:
            item = "- " if get_origin(hints[name]) is list else "  "
            nested = [("  " if i or filled else item) + line for i, line in enumerate(settings_lines(part))]
            lines += nested if filled else [f"# {line}" for line in nested]
    return lines


def _parts(hint: Any) -> list[Any]:
    """The types that an annotation is made of, itself included: Optional[X], list[X]."""
    return [hint, *(part for inner in get_args(hint) if get_origin(hint) is not Literal for part in _parts(inner))]


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)
