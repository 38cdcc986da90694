"""The command line, and the recipe that it names: read, overridden, its "auto" entries filled in, checked."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from largebatch.config import is_number, nearest_hint, one_of
from largebatch.launch.parameter_groups import check_baseline
from largebatch.models.registry import check_model
from largebatch.schedule import scaled_lr

DATA_SETS = ("digits", "mnist", "cifar10", "imagenet", "synthetic", "text")

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
    "stages": None,
    "schedule_stretch": 1.0,
    "seed": 1,
    "lr_scaling": None,
    "evaluate_every_epochs": 1,
    "save_every_epochs": None,
    "layer_stats_every_steps": "auto",
    "source": None,
    "expected": None,
    "hardware": None,
}
"""Keys of a ds_config's "largebatch" section, which only the trainer reads; DeepSpeed ignores it."""

LARGEST_AUTOMATIC_MICRO_BATCH = 256


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/train.py",
        description="Trains the model and data set of a recipe. The recipe is a DeepSpeed JSON with a 'largebatch' section.",
        allow_abbrev=False,
    )
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="the recipe, e.g. ds_configs/*.json")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set (not needed for digits)")
    parser.add_argument("--output", metavar="DIR", help="where results go (default: runs/<recipe>_seed<seed>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output from its last checkpoint")
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


def read_recipe(path: str) -> dict[str, Any]:
    """The JSON as it is.

    Raises:
        ValueError: no such file, or not a JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            recipe = json.load(file)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        names = sorted(n for n in os.listdir(folder) if n.endswith(".json")) if os.path.isdir(folder) else []
        hint = nearest_hint(os.path.basename(path), names)
        raise ValueError(f"--deepspeed_config is {path!r}, which does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--deepspeed_config {path!r} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed_config {path!r} is not JSON: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--deepspeed_config {path!r} holds a {type(recipe).__name__}; expected a JSON object")
    return recipe


def set_entry(recipe: dict[str, Any], assignment: str) -> None:
    """Applies one KEY=VALUE of --set, creating sections on the way."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ValueError(f"--set {assignment!r}; expected KEY=VALUE, e.g. optimizer.params.lr=2.5")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *sections, last = key.split(".")
    node = recipe
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"--set {assignment!r}: {section!r} is not a section of the recipe")
    node[last] = value


def apply_overrides(recipe: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe with everything that the command line changes."""
    recipe = copy.deepcopy(recipe)
    section = recipe.setdefault("largebatch", {})
    if not isinstance(section, dict):
        raise ValueError(f"largebatch is {section!r}; expected a section (JSON object)")
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
    return recipe


@dataclass(frozen=True)
class Plan:
    """A recipe with nothing left open: the ds_config for DeepSpeed and the lengths that follow from it."""

    config: dict[str, Any]
    num_steps: int
    global_batch: int
    micro_batch: int
    accumulation_steps: int

    @property
    def section(self) -> dict[str, Any]:
        return self.config["largebatch"]


def check_section(recipe: dict[str, Any]) -> dict[str, Any]:
    """The "largebatch" section with its defaults, checked."""
    given = recipe.get("largebatch", {})
    for key in given:
        if key not in SECTION_DEFAULTS:
            hint = nearest_hint(key, list(SECTION_DEFAULTS))
            raise ValueError(f"largebatch.{key} is not known{hint}; known: {', '.join(sorted(SECTION_DEFAULTS))}")
    section = SECTION_DEFAULTS | given
    check_model(section["model"], section["model_options"])
    one_of(*DATA_SETS)("largebatch.data", section["data"])
    if (section["epochs"] is None) == (section["steps"] is None):
        raise ValueError("largebatch needs either epochs or steps, the length of training")
    for key in ("epochs", "steps", "evaluate_every_epochs", "save_every_epochs"):
        if section[key] is not None and (not is_number(section[key]) or section[key] <= 0):
            raise ValueError(f"largebatch.{key} is {section[key]!r}; expected a number > 0")
    if not isinstance(section["seed"], int) or isinstance(section["seed"], bool) or section["seed"] < 0:
        raise ValueError(f"largebatch.seed is {section['seed']!r}; expected an integer >= 0")
    if not is_number(section["label_smoothing"]) or not 0 <= section["label_smoothing"] < 1:
        raise ValueError(f"largebatch.label_smoothing is {section['label_smoothing']!r}; expected >= 0 and < 1")
    return section


def check_keys(recipe: dict[str, Any]) -> None:
    """Refuses top-level keys that neither DeepSpeed nor the trainer reads: DeepSpeed ignores a misspelt one silently."""
    for key in recipe:
        near = nearest_hint(key, OFTEN_USED_KEYS)
        if key not in OFTEN_USED_KEYS and near:
            raise ValueError(f"{key} is not a key of a ds_config{near}")
    if "optimizer" not in recipe or not isinstance(recipe["optimizer"], dict) or "type" not in recipe["optimizer"]:
        raise ValueError('the recipe has no "optimizer": {"type": ..., "params": {...}} section')


OFTEN_USED_KEYS = (
    "largebatch", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer",
    "scheduler", "gradient_clipping", "zero_optimization", "zero_allow_untested_optimizer", "fp16", "bf16", "data_types",
    "communication_data_type", "tensorboard", "csv_monitor", "wandb", "steps_per_print", "wall_clock_breakdown",
    "prescale_gradients", "gradient_predivide_factor", "activation_checkpointing", "flops_profiler", "checkpoint",
    "zero_force_ds_cpu_optimizer", "aio", "comms_logger", "amp", "dump_state", "elasticity", "autotuning",
    "memory_breakdown", "sparse_gradients", "comet", "torch_autocast", "compile", "seed", "communication_overlap",
)  # fmt: skip


def micro_batch_for(recipe: dict[str, Any], global_batch: int, world_size: int) -> int:
    """The micro-batch of the recipe, or for "auto" the largest up to 256 that divides a rank's share.

    Raises:
        ValueError: the global batch cannot be made of it; names the nearest batches that can.
    """
    micro = recipe.get("train_micro_batch_size_per_gpu", "auto")
    if micro == "auto":
        if global_batch % world_size:
            raise ValueError(
                f"train_batch_size is {global_batch} and there are {world_size} ranks; expected a multiple of {world_size}, "
                f"such as {nearest_multiples(global_batch, world_size)}"
            )
        share = global_batch // world_size
        return max(d for d in range(1, min(share, LARGEST_AUTOMATIC_MICRO_BATCH) + 1) if share % d == 0)
    if not isinstance(micro, int) or micro < 1:
        raise ValueError(f'train_micro_batch_size_per_gpu is {micro!r}; expected an integer >= 1 or "auto"')
    if global_batch % (micro * world_size):
        raise ValueError(
            f"train_batch_size is {global_batch}, and {world_size} ranks with micro-batches of {micro} make multiples of "
            f"{micro * world_size}; nearest: {nearest_multiples(global_batch, micro * world_size)}. Change one of them, or "
            'set train_micro_batch_size_per_gpu to "auto"'
        )
    return micro


def nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{below + unit}"


def make_plan(recipe: dict[str, Any], *, num_samples: int, world_size: int, output: str) -> Plan:
    """Fills in every "auto" from the data set and the batch.

    Args:
        num_samples: images in the training set.
        output: folder of the run, for the TensorBoard log.

    Raises:
        ValueError: naming the entry, its value and what is allowed.
    """
    config = copy.deepcopy(recipe)
    check_keys(config)
    section = config["largebatch"] = check_section(config)
    check_baseline(config)
    global_batch = config.get("train_batch_size")
    if not isinstance(global_batch, int) or isinstance(global_batch, bool) or global_batch < 1:
        raise ValueError(f"train_batch_size is {global_batch!r}; expected an integer >= 1, the global batch")
    micro_batch = micro_batch_for(config, global_batch, world_size)
    accumulation_steps = global_batch // (micro_batch * world_size)
    given = config.get("gradient_accumulation_steps", "auto")
    if given not in ("auto", accumulation_steps):
        raise ValueError(
            f"gradient_accumulation_steps is {given!r}; expected {accumulation_steps} = train_batch_size {global_batch} / "
            f'(micro-batch {micro_batch} x {world_size} ranks), or "auto"'
        )
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulation_steps
    steps_per_epoch = num_samples / global_batch
    num_steps = section["steps"] or math.ceil(section["epochs"] * steps_per_epoch - 1e-9)
    section["layer_stats_every_steps"] = automatic(section["layer_stats_every_steps"], max(1, num_steps // 100))
    fill_accumulation(config, accumulation_steps)
    fill_optimizer(config, section, global_batch)
    fill_scheduler(config, num_steps, steps_per_epoch)
    tensorboard = {"enabled": True, "output_path": os.path.abspath(output), "job_name": "tensorboard"}
    config["tensorboard"] = tensorboard | config.get("tensorboard", {})
    config.setdefault("steps_per_print", 10**9)
    return Plan(config, int(num_steps), global_batch, micro_batch, accumulation_steps)


def automatic(value: Any, filled_in: Any) -> Any:
    return filled_in if value == "auto" else value


def fill_accumulation(config: dict[str, Any], accumulation_steps: int) -> None:
    """Gradients accumulate and travel in fp32 whatever the compute type, unless the recipe says otherwise.

    DeepSpeed's default is the compute type; over 256 micro-steps bf16 then loses two digits (tests/sharding/
    test_accumulation.py). Stage 0 has no fp32 accumulation under bf16 and fp16.
    """
    is_low_precision = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    if not is_low_precision:
        return
    if config.get("zero_optimization", {}).get("stage", 0) == 0:
        if accumulation_steps > 1:
            raise ValueError(
                f"zero_optimization.stage is 0 with bf16 or fp16 and {accumulation_steps} accumulation steps; DeepSpeed would "
                "add the gradients up in 16 bits there. Set the stage to 1 (the same on one rank, cheaper on many), or use "
                "--precision fp32"
            )
        return
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    config.setdefault("communication_data_type", "fp32")


def fill_optimizer(config: dict[str, Any], section: dict[str, Any], global_batch: int) -> None:
    params = config["optimizer"].setdefault("params", {})
    scaling = section["lr_scaling"]
    if params.get("lr") == "auto":
        if not isinstance(scaling, dict) or set(scaling) != {"rule", "base_lr", "base_batch"}:
            raise ValueError(
                f'optimizer.params.lr is "auto" and largebatch.lr_scaling is {scaling!r}; expected '
                '{"rule": "linear" | "sqrt" | "none", "base_lr": ..., "base_batch": ...}'
            )
        params["lr"] = scaled_lr(**scaling, global_batch=global_batch)
    elif scaling is not None:
        raise ValueError(
            f'largebatch.lr_scaling has no effect while optimizer.params.lr is {params.get("lr")!r}; set that to "auto"'
        )


def fill_scheduler(config: dict[str, Any], num_steps: int, steps_per_epoch: float) -> None:
    if "scheduler" not in config:
        return
    params = config["scheduler"].setdefault("params", {})
    for name, value in (("total_steps", num_steps), ("steps_per_epoch", steps_per_epoch)):
        if params.get(name) == "auto":
            params[name] = value
