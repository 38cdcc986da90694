"""The recipes that come with the package: where they are, by name."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import largebatch.ds_configs
from largebatch.config import nearest_hint


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
