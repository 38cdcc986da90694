"""The recipes that come with the package, and the one that a command line names: found, read and overridden."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pathlib
from typing import Any

import largebatch.ds_configs
from largebatch.config import nearest_hint
from largebatch.engine.config_checks.json_files import read_json
from largebatch.launch.recipe.flags import tell
from largebatch.launch.recipe.section import check_sections, with_current_names


def recipe_paths() -> dict[str, pathlib.Path]:
    """Name -> JSON file, sorted by name; from a clone and from an installed package alike."""
    folder = pathlib.Path(largebatch.ds_configs.__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_recipe(name: str) -> pathlib.Path:
    """The file of a recipe.

    Raises:
        ValueError: there is none of that name; names the nearest.
    """
    paths = recipe_paths()
    if name.removesuffix(".json") not in paths:
        hint = nearest_hint(name, list(paths))
        raise ValueError(f"{name!r} is not a recipe{hint}; `largebatch recipes` lists all {len(paths)}")
    return paths[name.removesuffix(".json")]


def load_recipes() -> dict[str, dict[str, Any]]:
    """Name -> recipe as it is written."""
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in recipe_paths().items()}


def read_recipe(path: str) -> dict[str, Any]:
    """The JSON as it is: a file, or by its bare name a recipe that comes with the package.

    Raises:
        ValueError: no such file, not a JSON object, or one with a key twice.
    """
    if not os.path.dirname(path) and not path.endswith(".json") and not os.path.exists(path):
        path = str(find_recipe(path))
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        names = sorted(n for n in os.listdir(folder) if n.endswith(".json")) if os.path.isdir(folder) else []
        hint = nearest_hint(os.path.basename(path), names)
        raise ValueError(f"--deepspeed_config is {path!r}, which does not exist{hint}")
    return renamed(read_json(path, f"--deepspeed_config {path!r}"))


def renamed(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the keys that there are now; rank 0 says which of them had other names."""
    recipe, notes = with_current_names(recipe)
    for note in notes:
        tell(note)
    return recipe


def set_entry(recipe: dict[str, Any], assignment: str) -> None:
    """Applies one KEY=VALUE of --set, creating sections on the way."""
    key, separator, text = assignment.partition("=")
    if not separator or not all(key.split(".")):
        raise ValueError(f"--set {assignment!r}; expected KEY=VALUE, e.g. optimizer.params.lr=2.5")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *sections, last = key.split(".")
    node = recipe
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"--set {assignment!r}: {section!r} is not a section of the recipe")
    node[last] = value


def set_precision(recipe: dict[str, Any], precision: str) -> None:
    """Makes a compute type that of a recipe, whose options for it stay."""
    for name in ("fp16", "bf16"):
        if precision == name:
            recipe.setdefault(name, {})["enabled"] = True
        else:
            recipe.pop(name, None)


def apply_overrides(recipe: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe with everything that the command line changes, without top-level entries that are null.

    Raises:
        ValueError, TypeError: an override that is none, or a section of the recipe that is none.
    """
    recipe = copy.deepcopy(recipe)
    section = recipe.setdefault("largebatch", {})
    check_sections(recipe)
    if arguments.seed is not None:
        section["seed"] = arguments.seed
    if arguments.epochs is not None:
        section["epochs"], section["steps"] = arguments.epochs, None
    if arguments.steps is not None:
        section["steps"], section["epochs"] = arguments.steps, None
    if arguments.zero_stage is not None:
        recipe.setdefault("zero_optimization", {})["stage"] = arguments.zero_stage
    if arguments.precision is not None:
        set_precision(recipe, arguments.precision)
    for assignment in arguments.set:
        set_entry(recipe, assignment)
    recipe = renamed({key: value for key, value in recipe.items() if value is not None})
    check_sections(recipe)
    return recipe
