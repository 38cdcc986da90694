"""The runs of a study: for each optimizer and batch a recipe, found in a folder of recipes or scaled from the nearest.

Where no recipe has the batch, the nearest one (by the ratio of the batches) gives everything, and

- the learning rate follows the recipe's own ``lr_scaling`` rule, or, where that is "none" or the learning rate is a
  number, the optimizer's: linear for SGD (Goyal et al., arXiv:1706.02677, section 2.1), the square root of the batch for
  all others (LAMB: arXiv:1904.00962, section 4; the LARS recipes of that paper's first author's group,
  github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, use it for LARS too);
- LAMB, N-LAMB and NN-LAMB warm up for a number of epochs proportional to the batch (arXiv:1904.00962, Table 5's rule),
  at most half of the training; the others keep their warm-up in epochs;
- lengths in steps are divided by the ratio of the batches, so that the number of epochs stays.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from dataclasses import dataclass
from typing import Any

from largebatch.config import nearest_hint
from largebatch.launch.recipe.reading import read_recipe

LINEAR_RULE = ("sgd",)
WARMUP_GROWS_WITH_BATCH = ("lamb", "nlamb", "nnlamb")
STEP_COUNTS = ("warmup_steps", "constant_steps", "total_steps", "milestone_steps")


@dataclass(frozen=True)
class Cell:
    """One setting of the grid.

    Attributes:
        recipe: the ds_config, with nothing of the command line applied.
        origin: what the recipe is and where it comes from, for people.
    """

    optimizer: str
    batch: int
    recipe: dict[str, Any]
    origin: str

    @property
    def name(self) -> str:
        return f"{self.optimizer}_{batch_label(self.batch)}"


@dataclass(frozen=True)
class GridRun:
    """One run of the grid: a cell with a seed."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.cell.name}_seed{self.seed}"


def batch_label(batch: int) -> str:
    """As in the recipes' names: 512 -> 512, 1024 -> 1k, 32768 -> 32k, 60000 -> 60k."""
    for unit in (1024, 1000):
        if batch >= unit and batch % unit == 0:
            return f"{batch // unit}k"
    return str(batch)


def find_recipes(
    folder: str, model: str, data: str, optimizer: str, variant: str | None
) -> dict[int, tuple[str, dict[str, Any]]]:
    """{global batch: (name, recipe)} of ``<model>_<data>_<optimizer>_<batch>[_<variant>].json``.

    An optimizer that has no recipe of the variant takes those without one.

    Raises:
        ValueError: the folder holds none; names what there is.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"--recipes is {folder!r}, which is not a folder; expected one with recipes (*.json)")
    prefix = f"{model}_{data}_{optimizer}_"
    names = sorted(name[:-5] for name in os.listdir(folder) if name.endswith(".json"))
    found: dict[str, dict[int, tuple[str, dict[str, Any]]]] = {}
    for name in names:
        if name.startswith(prefix):
            recipe = read_recipe(os.path.join(folder, f"{name}.json"))
            _, _, its_variant = name.removeprefix(prefix).partition("_")
            found.setdefault(its_variant, {})[recipe["train_batch_size"]] = (name, recipe)
    if not found:
        families = sorted({"_".join(name.split("_")[:-1]) for name in names})
        raise ValueError(
            f"no recipe {prefix}<batch>.json in {folder!r}{nearest_hint(prefix.rstrip('_'), families)}; "
            f"there are: {', '.join(families) or 'none at all'}"
        )
    chosen = found.get(variant or "") or found.get("")
    if chosen is None:
        raise ValueError(
            f"--variant is {variant!r} and the recipes {prefix}<batch> have variants only; expected one of "
            f"{', '.join(sorted(found))}"
        )
    return chosen


def make_cell(folder: str, model: str, data: str, optimizer: str, batch: int, variant: str | None = None) -> Cell:
    """The recipe of one optimizer and batch, scaled from the nearest batch where there is none."""
    recipes = find_recipes(folder, model, data, optimizer, variant)
    if batch in recipes:
        name, recipe = recipes[batch]
        return Cell(optimizer, batch, recipe, name)
    nearest = min(recipes, key=lambda b: (abs(math.log(b / batch)), b))
    name, recipe = recipes[nearest]
    scaled, how = scaled_recipe(recipe, optimizer, batch)
    return Cell(optimizer, batch, scaled, f"{name} scaled from {nearest:,} to {batch:,} ({how})")


def scaled_recipe(recipe: dict[str, Any], optimizer: str, batch: int) -> tuple[dict[str, Any], str]:
    """The recipe for another batch by the rules in the module's docstring, and what was done, for people.

    Raises:
        ValueError: it has phases, for which there are no rules.
    """
    if recipe["largebatch"].get("phases") is not None:
        raise ValueError(
            f"batch {batch} has no recipe, and the nearest, of {recipe['train_batch_size']}, has phases, which cannot be "
            "scaled; choose a batch that has a recipe"
        )
    recipe = copy.deepcopy(recipe)
    section, base = recipe["largebatch"], recipe["train_batch_size"]
    ratio = batch / base
    recipe["train_batch_size"] = batch
    recipe["train_micro_batch_size_per_gpu"] = recipe["gradient_accumulation_steps"] = "auto"
    section.pop("expected", None)
    params = recipe["optimizer"]["params"]
    scaling = section.get("lr_scaling")
    if scaling is None or scaling["rule"] == "none":
        base_lr = params["lr"] if scaling is None else scaling["base_lr"]
        rule = "linear" if optimizer in LINEAR_RULE else "sqrt"
        section["lr_scaling"] = scaling = {"rule": rule, "base_lr": base_lr, "base_batch": base}
        params["lr"] = "auto"
    how = [f"learning rate: {scaling['rule']} rule"]
    if section.get("steps") is not None:
        section["steps"] = max(1, round(section["steps"] / ratio))
    schedule = recipe.get("scheduler", {}).get("params", {})
    for key in STEP_COUNTS:
        if isinstance(schedule.get(key), int) and schedule[key]:
            schedule[key] = max(1, round(schedule[key] / ratio))
        elif isinstance(schedule.get(key), list):
            schedule[key] = [max(1, round(steps / ratio)) for steps in schedule[key]]
    if optimizer in WARMUP_GROWS_WITH_BATCH and schedule.get("warmup_epochs"):
        warmup = schedule["warmup_epochs"] * ratio
        if section.get("epochs") is not None:
            warmup = min(warmup, section["epochs"] / 2)
        schedule["warmup_epochs"] = warmup
        how.append(f"warm-up: {warmup:.4g} epochs")
    return recipe, ", ".join(how)


def expand(
    folder: str,
    *,
    model: str,
    data: str,
    optimizers: list[str],
    batches: list[int],
    seeds: list[int],
    variant: str | None = None,
) -> list[GridRun]:
    """All runs, seed by seed, so that a study that is cut short has all cells with fewer seeds.

    Raises:
        ValueError: an optimizer has no recipe, or two batches would have the same name.
    """
    for one, other in itertools.combinations(batches, 2):
        if batch_label(one) == batch_label(other):
            raise ValueError(f"--batches has {one} and {other}, both called {batch_label(one)}; expected one of them")
    cells = [make_cell(folder, model, data, optimizer, batch, variant) for batch in batches for optimizer in optimizers]
    return [GridRun(cell, seed) for seed in seeds for cell in cells]
