"""The command line, and the recipe that it names: read and overridden."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pathlib
import sys
from typing import Any

import largebatch.ds_configs
from largebatch.config import nearest_hint
from largebatch.engine.config_checks.json_files import read_json
from largebatch.launch.recipe.section import check_sections, with_current_names


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/train.py",
        description="Trains the model and data set of a recipe. The recipe is a DeepSpeed JSON with a 'largebatch' section.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="JSON", help="a recipe: a file, or a name of `largebatch recipes`"
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the data set (not needed for digits)")
    parser.add_argument("--output", metavar="DIR", help="where results go (default: runs/<recipe>_seed<seed>)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        help="continue the run in --output from its newest whole checkpoint; auto: from the beginning if there is none yet",
    )
    parser.add_argument("--seed", type=int, help="of initialisation, data order and dropout")
    parser.add_argument("--epochs", type=float, help="length of training, in passes over the data")
    parser.add_argument("--steps", type=int, help="length of training, in optimizer steps")
    parser.add_argument("--zero_stage", type=int, help="ZeRO stage in place of the recipe's")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="compute type in place of the recipe's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any entry of the JSON, e.g. optimizer.params.lr=2.5 (the value is JSON; may be repeated)",
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return parser.parse_args(argv)


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
    for note in notes if os.environ.get("RANK", "0") == "0" else ():
        print(f"largebatch: note: {note}", file=sys.stderr)
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
        for name in ("fp16", "bf16"):
            if arguments.precision == name:
                recipe.setdefault(name, {})["enabled"] = True
            else:
                recipe.pop(name, None)
    for assignment in arguments.set:
        set_entry(recipe, assignment)
    recipe = renamed({key: value for key, value in recipe.items() if value is not None})
    check_sections(recipe)
    return recipe
