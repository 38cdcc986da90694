"""The recipe that a plan starts from, and the recipe that it ends with: batch, learning rate, warm-up and length."""

from __future__ import annotations

import copy
from typing import Any

from largebatch.engine.lr_schedulers import SCHEDULERS
from largebatch.launch.recipe.batch_division import micro_batch_candidates
from largebatch.launch.recipe.reading import find_recipe, load_recipes
from largebatch.launch.recipe.resolved_run import LENGTHS
from largebatch.launch.recipe.section import check_section
from largebatch.planning.choice import batch_unit, nearest_batches
from largebatch.planning.memory import STATE_BYTES
from largebatch.planning.scaling_rules import Rates, default_rule, lars_table_rates, scaled_rates
from largebatch.schedule import scaled_lr

LARS_PAPER = "1708.03888"


def nearest_recipe(model: str, data: str | None, optimizer: str | None, global_batch: int | None) -> tuple[str, dict]:
    """Name and content of the package's recipe for model, data and optimizer whose batch is nearest.

    For LARS at a batch that no recipe has, one of the LARS paper, whose table then has the learning rate.

    Raises:
        ValueError: there is none.
    """
    found = [
        (name, recipe)
        for name, recipe in load_recipes().items()
        if recipe["largebatch"]["model"] == model
        and data in (None, recipe["largebatch"]["data"])
        and (optimizer or "").lower() in ("", recipe["optimizer"]["type"].lower())
    ]
    if not found:
        asked = ", ".join(filter(None, (model, data, optimizer)))
        raise ValueError(f"there is no recipe for {asked}; give --recipe PATH, or see `largebatch recipes`")
    wanted = global_batch or 1

    def distance(item: tuple[str, dict]) -> tuple:
        name, recipe = item
        batch = recipe["train_batch_size"]
        is_other_lars = recipe["optimizer"]["type"].lower() == "lars" and not is_of_lars_paper(recipe)
        return batch != wanted, is_other_lars, max(batch, wanted) / min(batch, wanted), len(name), name

    return min(found, key=distance)


def is_of_lars_paper(recipe: dict[str, Any]) -> bool:
    return LARS_PAPER in (recipe["largebatch"].get("source") or "")


def read(arguments: Any, read_file: Any) -> tuple[str, dict[str, Any]]:
    """(name, recipe) that the command line names.

    Args:
        read_file: path -> recipe, for a --recipe that is a file.
    """
    if arguments.recipe is None:
        return nearest_recipe(arguments.model, arguments.data_set, arguments.optimizer, arguments.global_batch)
    if arguments.recipe.endswith(".json") or "/" in arguments.recipe:
        return arguments.recipe, read_file(arguments.recipe)
    return arguments.recipe, read_file(str(find_recipe(arguments.recipe)))


def precision_of(recipe: dict[str, Any]) -> str:
    return next((name for name in ("bf16", "fp16") if recipe.get(name, {}).get("enabled")), "fp32")


def optimizer_of(recipe: dict[str, Any]) -> tuple[str, int | None]:
    """Key of memory.STATE_BYTES, and the bytes of state per parameter where they are not the usual.

    Raises:
        ValueError: an optimizer whose state is not known.
    """
    optimizer = recipe["optimizer"]
    name, params = str(optimizer["type"]).lower(), optimizer.get("params") or {}
    if name == "sgd" and params.get("momentum"):
        name = "momentum"
    if name not in STATE_BYTES:
        known = ", ".join(key for key in STATE_BYTES if key != "momentum")
        raise ValueError(f"optimizer.type is {optimizer['type']!r}; the memory of {known} is known")
    return name, STATE_BYTES[name] // 2 if params.get("state_dtype") == "bf16" else None


def base_rates(recipe: dict[str, Any], num_samples: int | None) -> tuple[float, float]:
    """Peak learning rate, and epochs of warm-up (NaN where they are in steps of an unknown data set)."""
    section, params = recipe["largebatch"], recipe["optimizer"].get("params", {})
    lr = params.get("lr")
    if lr == "auto":
        lr = scaled_lr(**section["lr_scaling"], global_batch=recipe["train_batch_size"])
    schedule = recipe.get("scheduler", {}).get("params", {})
    if schedule.get("warmup_steps"):
        samples = schedule["warmup_steps"] * recipe["train_batch_size"]
        return lr, samples / num_samples if num_samples else float("nan")
    return lr, schedule.get("warmup_epochs") or 0.0


def planned_rates(
    recipe: dict[str, Any], *, rule: str | None, global_batch: int, num_samples: int | None
) -> Rates | None:
    """Learning rate and warm-up by the rule; None: the recipe's own, since its batch is the one asked for.

    Raises:
        ValueError: the rule has nothing to say on the model, the batch or the scheduler.
    """
    optimizer, base_batch = recipe["optimizer"]["type"], recipe["train_batch_size"]
    if rule is None and global_batch == base_batch:
        return None
    rule = rule or default_rule(optimizer)
    if rule == "table":
        if optimizer.lower() != "lars":
            raise ValueError(
                f"--rule table is of the LARS paper, and the optimizer is {optimizer}; use linear, sqrt or none"
            )
        rates = lars_table_rates(recipe["largebatch"]["model"], global_batch)
        if not is_of_lars_paper(recipe):
            raise ValueError(
                f"the LARS paper's table goes with its own settings, and the recipe is from {recipe['largebatch']['source']!r}; "
                "start from a recipe of arXiv:1708.03888 (`largebatch recipes --text 1708.03888`), or give --rule sqrt, linear or none"
            )
    else:
        lr, warmup = base_rates(recipe, num_samples)
        schedule = recipe.get("scheduler", {}).get("params", {})
        rates = scaled_rates(
            rule,
            global_batch=global_batch,
            base_lr=lr,
            base_batch=base_batch,
            base_warmup_epochs=warmup,
            start_factor=schedule.get("warmup_start_factor", 0.0),
        )
    scheduler = recipe.get("scheduler", {}).get("type")
    if rates.warmup_epochs and scheduler not in SCHEDULERS:
        raise ValueError(
            f"--rule {rule} sets a warm-up, and scheduler.type is {scheduler!r}; expected one of {', '.join(SCHEDULERS)}. Give the "
            "recipe one of them, or --rule none"
        )
    if rates.warmup_epochs != rates.warmup_epochs:
        raise ValueError(
            f"--rule {rule} needs the warm-up in epochs, and the recipe has it in steps; give --num-samples"
        )
    return rates


def divisible_batch(recipe: dict[str, Any], global_batch: int, world_size: int) -> tuple[int, str | None]:
    """The batch, or the nearest that these ranks can make, and then a line that says so.

    Args:
        recipe: with a checked section.
    """
    section = recipe["largebatch"]
    try:
        micro_batch_candidates(recipe | {"train_batch_size": global_batch}, world_size)
        return global_batch, None
    except ValueError:
        size = section["batch_norm"].get("ghost_batch_size")
        unit = batch_unit(world_size, size if isinstance(size, int) else None, global_batch, bool(section["mixup"]))
    below, above = nearest_batches(global_batch, unit)
    chosen = below if global_batch - below <= above - global_batch else above
    other = above if chosen == below else below
    micro_batch_candidates(recipe | {"train_batch_size": chosen}, world_size)
    return chosen, (
        f"a global batch of {global_batch:,} does not divide over {world_size} ranks; planned is the nearest multiple of {unit}, "
        f"{chosen:,} (the next is {other:,})"
    )


def planned_recipe(
    recipe: dict[str, Any], *, global_batch: int, rates: Rates | None, num_samples: int | None
) -> dict[str, Any]:
    """The recipe at another batch: as many samples in all, learning rate and warm-up as given."""
    planned = copy.deepcopy(recipe)
    section, base_batch = planned["largebatch"], recipe["train_batch_size"]
    planned["train_batch_size"] = global_batch
    planned["train_micro_batch_size_per_gpu"] = planned["gradient_accumulation_steps"] = "auto"
    schedule = planned.get("scheduler", {}).get("params", {})
    if global_batch != base_batch:
        rescale_steps(section, schedule, base_batch / global_batch)
        section["expected"] = None
    params = planned["optimizer"].setdefault("params", {})
    if rates is None:
        params["lr"], _ = base_rates(recipe, num_samples)
    else:
        params["lr"] = float(f"{rates.lr:.6g}")
        for name in ("warmup_steps", "warmup_epochs", "warmup_start_factor"):
            schedule.pop(name, None)
        if rates.warmup_epochs:
            schedule |= {"warmup_epochs": rates.warmup_epochs, "steps_per_epoch": "auto"}
            if rates.warmup_start_factor:
                schedule["warmup_start_factor"] = rates.warmup_start_factor
    section["lr_scaling"] = None
    check_section(planned)
    return planned


def rescale_steps(section: dict[str, Any], schedule: dict[str, Any], factor: float) -> None:
    """Lengths in steps, so that they hold as many samples as before."""
    if section["steps"] is not None:
        section["steps"] = max(1, round(section["steps"] * factor))
    for name in LENGTHS:
        value = schedule.get(name)
        if name.endswith("_steps") and isinstance(value, (int, float)):
            schedule[name] = round(value * factor)
        elif name.endswith("_steps") and isinstance(value, list):
            schedule[name] = [round(milestone * factor) for milestone in value]
