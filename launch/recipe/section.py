"""The "largebatch" section of a recipe, which DeepSpeed ignores: its keys, their defaults and checks, and its phases.

A recipe with ``phases`` is several trainings, one after the other, each of which goes on with the weights and the optimizer
state of the one before. A phase is a part of a recipe, laid over the rest of it section by section, e.g. BERT's mixed batch:

    {"largebatch": {"model": "bert", "data": "text", ..., "phases": [
         {"largebatch": {"steps": 7038, "data_options": {"sequence_length": 128}}, "train_batch_size": 65536,
          "scheduler": {"params": {"warmup_steps": 2000}}},
         {"largebatch": {"steps": 1561, "data_options": {"sequence_length": 512}}, "train_batch_size": 32768,
          "optimizer": {"params": {"lr": 0.004}}, "scheduler": {"params": {"warmup_steps": 200}}}]},
     "optimizer": ..., "scheduler": {"type": "WarmupPolyLR", "params": {"total_steps": "auto", "power": 1}}}

Each phase's schedule begins anew. Model, model options, optimizer type, precision and ZeRO stage stay.
"""

from __future__ import annotations

import copy
from typing import Any

from largebatch.config import (
    NON_NEGATIVE,
    POSITIVE,
    boolean,
    check_option_names,
    integer,
    is_finite,
    is_number,
    nearest_hint,
    number,
    one_of,
    reject,
)
from largebatch.launch.data.options import AUGMENTATIONS, DATA_SETS, check_data_options
from largebatch.models.catalogue import check_model

SECTION_DEFAULTS: dict[str, Any] = {
    "model": None,
    "model_options": {},
    "data": None,
    "data_options": {},
    "augmentation": "none",
    "mixup": 0.0,
    "label_smoothing": 0.0,
    "batch_norm": {},
    "no_weight_decay": [],
    "epochs": None,
    "steps": None,
    "phases": None,
    "schedule_stretch": 1.0,
    "seed": 1,
    "lr_scaling": None,
    "evaluate_every_epochs": 1,
    "save_every_epochs": None,
    "save_in_background": False,
    "keep_last": None,
    "keep_best": None,
    "collective_timeout_seconds": None,
    "layer_stats_every_steps": "auto",
    "source": None,
    "expected": None,
    "hardware": None,
}
"""Keys of the section."""

METRICS = {
    "images": ("top1", "top5", "test_loss"),
    "text": ("mlm_accuracy", "nsp_accuracy", "mlm_loss", "nsp_loss", "test_loss"),
}
"""Of an evaluation, by kind of data."""

SECTIONS = (
    ("largebatch",), ("optimizer",), ("optimizer", "params"), ("scheduler",), ("scheduler", "params"), ("zero_optimization",),
    ("fp16",), ("bf16",), ("data_types",), ("tensorboard",), ("timers",), ("timers", "throughput"),
)  # fmt: skip
"""Of a recipe, in which the trainer reads or writes entries."""

LONGEST = 2**40
"""Steps and epochs: more is a slip of the pen."""

LARGEST_SEED = 2**31 - 1

EXPECTED_KEYS = ("metric", "value", "band", "is_approximate")

KEPT_BY_PHASES = (
    ("largebatch", "model"), ("largebatch", "model_options"), ("largebatch", "seed"), ("largebatch", "no_weight_decay"),
    ("optimizer", "type"), ("fp16",), ("bf16",), ("data_types",), ("zero_optimization",), ("tensorboard",),
)  # fmt: skip
"""What a phase cannot change: the optimizer state of the phase before would not fit, or it has no meaning."""


RENAMED = {("stages",): "phases", ("batch_norm", "span"): "ghost_batch_size"}
"""Entry of the "largebatch" section that had another name -> the key that it has now."""


def with_current_names(recipe: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The recipe with the keys that there are now, and one line for each that had another name.

    Raises:
        ValueError: an entry is given under both names.
    """
    recipe, notes = copy.deepcopy(recipe), []
    section = recipe.get("largebatch")
    for path, new in RENAMED.items():
        *above, old = path
        node = section
        for key in above:
            node = node.get(key) if isinstance(node, dict) else None
        if not isinstance(node, dict) or old not in node:
            continue
        name = ".".join(("largebatch", *above))
        if new in node:
            raise ValueError(f"{name}.{old} is an earlier name of {name}.{new}, and both are given; keep {new}")
        node[new] = node.pop(old)
        notes.append(f"{name}.{old} is called {name}.{new} now")
    phases = section.get("phases") if isinstance(section, dict) else None
    for position, phase in enumerate(phases if isinstance(phases, list) else ()):
        if isinstance(phase, dict):
            phases[position], more = with_current_names(phase)
            notes += more
    return recipe, list(dict.fromkeys(notes))


def check_sections(recipe: dict[str, Any]) -> None:
    """Refuses a value in the place of a section.

    Raises:
        TypeError: naming the section and the value.
    """
    for path in SECTIONS:
        node: Any = recipe
        for key in path:
            node = node.get(key) if node is not None else None
        if node is not None and not isinstance(node, dict):
            reject(".".join(path), node, "a section (JSON object)", TypeError)


def check_section(recipe: dict[str, Any]) -> dict[str, Any]:
    """The "largebatch" section with its defaults, checked. That of a recipe with phases: all but what only they give.

    Raises:
        ValueError, TypeError: naming the key, its value and what is allowed.
    """
    given = recipe.get("largebatch", {})
    for key in given:
        if key not in SECTION_DEFAULTS:
            hint = nearest_hint(key, list(SECTION_DEFAULTS))
            raise ValueError(f"largebatch.{key} is not known{hint}; known: {', '.join(sorted(SECTION_DEFAULTS))}")
    section = SECTION_DEFAULTS | given
    if not isinstance(section["model"], str):
        reject("largebatch.model", section["model"], "the name of a model", TypeError)
    check_model(section["model"], section["model_options"])
    one_of(*DATA_SETS)("largebatch.data", section["data"])
    check_length(section)
    for key in ("evaluate_every_epochs", "save_every_epochs"):
        number("a number > 0", lambda x: x > 0, or_none=key == "save_every_epochs")(f"largebatch.{key}", section[key])
    check_saving(section)
    POSITIVE("largebatch.schedule_stretch", section["schedule_stretch"])
    integer(0)("largebatch.seed", section["seed"])
    if section["seed"] > LARGEST_SEED:
        reject("largebatch.seed", section["seed"], f"an integer from 0 to {LARGEST_SEED}")
    integer(1, or_auto=True)("largebatch.layer_stats_every_steps", section["layer_stats_every_steps"])
    check_inputs(section)
    check_batch_norm(section["batch_norm"])
    check_notes(section)
    return section


def check_length(section: dict[str, Any]) -> None:
    for key in ("epochs", "steps"):
        value = section[key]
        if value is not None and (not is_number(value) or not is_finite(value) or not 0 < value <= LONGEST):
            reject(f"largebatch.{key}", value, f"a number > 0, and at most {LONGEST}")
    if section["steps"] is not None and section["steps"] != int(section["steps"]):
        reject("largebatch.steps", section["steps"], "a whole number; a length in epochs may be a fraction")
    if section["epochs"] is not None and section["steps"] is not None:
        raise ValueError("largebatch needs either epochs or steps, the length of training; it has both")
    if section["epochs"] is None and section["steps"] is None and section["phases"] is None:
        raise ValueError("largebatch needs either epochs or steps, the length of training")


def check_saving(section: dict[str, Any]) -> None:
    """How checkpoints are written and which are kept; how long ranks wait for one another."""
    boolean("largebatch.save_in_background", section["save_in_background"])
    last = section["keep_last"]
    if last is not None and (not isinstance(last, int) or isinstance(last, bool) or last < 1):
        reject("largebatch.keep_last", last, "null (all are kept) or an integer >= 1")
    one_of(None, *METRICS["text" if section["data"] == "text" else "images"])(
        "largebatch.keep_best", section["keep_best"]
    )
    number("null or a number > 0", lambda x: x > 0, or_none=True)(
        "largebatch.collective_timeout_seconds", section["collective_timeout_seconds"]
    )


def check_inputs(section: dict[str, Any]) -> None:
    """Data options, augmentation, mixup and label smoothing: known to this data set."""
    data = section["data"]
    check_data_options(data, section["data_options"])
    choices = AUGMENTATIONS[data]
    if section["augmentation"] not in choices:
        expected = f"{', '.join(map(repr, choices))} for data {data!r}"
        reject("largebatch.augmentation", section["augmentation"], expected)
    NON_NEGATIVE("largebatch.mixup", section["mixup"])
    number("a number >= 0 and < 1", lambda x: 0 <= x < 1)("largebatch.label_smoothing", section["label_smoothing"])
    if data == "text":
        for key in ("mixup", "label_smoothing"):
            if section[key]:
                raise ValueError(f"largebatch.{key} is {section[key]!r} and has no effect on text; leave it out")


def check_batch_norm(options: Any) -> None:
    if not isinstance(options, dict):
        reject("largebatch.batch_norm", options, 'a section such as {"ghost_batch_size": 64}', TypeError)
    check_option_names(options, ["ghost_batch_size", "momentum"], "largebatch.batch_norm")
    if "momentum" in options:
        number("a number > 0 and < 1", lambda x: 0 < x < 1)("largebatch.batch_norm.momentum", options["momentum"])


def check_notes(section: dict[str, Any]) -> None:
    """What is for people: source, hardware, expected."""
    for key in ("source", "hardware"):
        if section[key] is not None and not isinstance(section[key], str):
            reject(f"largebatch.{key}", section[key], "null or a text", TypeError)
    expected = section["expected"]
    if expected is not None and (not isinstance(expected, dict) or sorted(expected) != sorted(EXPECTED_KEYS)):
        reject("largebatch.expected", expected, f"null or a section with {', '.join(EXPECTED_KEYS)}")


def phase_recipes(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe of each phase, itself without phases; the recipe alone where it has none.

    Raises:
        ValueError, TypeError: ``phases`` is no list of parts of a recipe, or one changes what has to stay.
    """
    phases = recipe.get("largebatch", {}).get("phases")
    if phases is None:
        return [recipe]
    if not isinstance(phases, list) or not phases or not all(isinstance(phase, dict) for phase in phases):
        reject("largebatch.phases", phases, "null or a list of parts of a recipe, one for each phase", TypeError)
    base = copy.deepcopy(recipe)
    base["largebatch"]["phases"] = None
    merged = []
    for position, phase in enumerate(phases):
        name = f"largebatch.phases[{position}]"
        if not isinstance(phase.get("largebatch", {}), dict):
            reject(f"{name}.largebatch", phase["largebatch"], "a section (JSON object)", TypeError)
        if "phases" in phase.get("largebatch", {}):
            raise ValueError(f"{name} has phases of its own; list all phases in the recipe")
        for path in KEPT_BY_PHASES:
            if is_given(phase, path):
                raise ValueError(f"{name} sets {'.'.join(path)}, which all phases share; set it in the recipe itself")
        merged.append(merge(base, phase, name))
    return merged


def is_given(node: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return True


def merge(below: dict[str, Any], above: dict[str, Any], name: str) -> dict[str, Any]:
    """``below`` with the entries of ``above``, section by section; a length of one kind takes the place of the other."""
    result = copy.deepcopy(below)
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        for prefix in ("", "warmup_", "constant_", "total_", "milestone_"):
            if f"{prefix}{one}" in above and f"{prefix}{other}" not in above:
                result.pop(f"{prefix}{other}", None)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value, f"{name}.{key}")
        elif isinstance(result.get(key), dict) and value is not None:
            reject(f"{name}.{key}", value, "a section (JSON object)", TypeError)
        else:
            result[key] = copy.deepcopy(value)
    return result
