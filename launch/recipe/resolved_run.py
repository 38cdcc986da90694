"""What a recipe comes to on a data set and a number of ranks: its "auto" entries filled in, everything checked."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from typing import Any

from largebatch.config import is_number, nearest_hint
from largebatch.engine.lr_schedulers import SCHEDULERS
from largebatch.launch.recipe.baseline_options import check_baseline
from largebatch.launch.recipe.batch_division import micro_batch_for
from largebatch.launch.recipe.section import LONGEST, check_section, check_sections
from largebatch.schedule import scaled_lr

LENGTHS = tuple(
    f"{phase}_{unit}" for phase in ("total", "warmup", "constant", "milestone") for unit in ("steps", "epochs")
)
"""Of our schedulers' params."""


@dataclass(frozen=True)
class ResolvedRun:
    """A recipe with nothing left open: the ds_config for DeepSpeed and the lengths that follow from it."""

    config: dict[str, Any]
    num_steps: int
    global_batch: int
    micro_batch: int
    accumulation_steps: int

    @property
    def section(self) -> dict[str, Any]:
        return self.config["largebatch"]


LARGEST_BATCH = 2**31 - 1


def check_keys(recipe: dict[str, Any]) -> None:
    """Refuses top-level keys that are near to one that is often used; train.py knows all that DeepSpeed reads."""
    for key in recipe:
        near = nearest_hint(key, OFTEN_USED_KEYS)
        if key not in OFTEN_USED_KEYS and near:
            raise ValueError(f"{key} is not a key of a ds_config{near}")
    if "optimizer" not in recipe or not isinstance(recipe["optimizer"], dict) or "type" not in recipe["optimizer"]:
        raise ValueError('the recipe has no "optimizer": {"type": ..., "params": {...}} section')
    check_sections(recipe)
    for name in ("optimizer", "scheduler"):
        if name in recipe and recipe[name].get("params") is None:
            recipe[name]["params"] = {}


OFTEN_USED_KEYS = (
    "largebatch", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer",
    "scheduler", "gradient_clipping", "zero_optimization", "zero_allow_untested_optimizer", "fp16", "bf16", "data_types",
    "communication_data_type", "timers", "tensorboard", "csv_monitor", "wandb", "steps_per_print", "wall_clock_breakdown",
    "prescale_gradients", "gradient_predivide_factor", "activation_checkpointing", "flops_profiler", "checkpoint",
    "zero_force_ds_cpu_optimizer", "aio", "comms_logger", "amp", "dump_state", "elasticity", "autotuning",
    "memory_breakdown", "sparse_gradients", "comet", "torch_autocast", "compile", "seed", "communication_overlap",
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """One of the trainings that a run consists of, and where in the run it lies.

    Attributes:
        number: from 0.
        first_step, first_sample: steps and samples of the run before this phase.
        total_steps, total_samples: of the whole run.
    """

    number: int
    num_phases: int
    resolved: ResolvedRun
    first_step: int
    first_sample: int
    total_steps: int
    total_samples: int

    @property
    def end(self) -> int:
        """Steps of the run after this phase."""
        return self.first_step + self.resolved.num_steps

    @property
    def seed(self) -> int:
        """Of the data order: each phase has one of its own."""
        return self.resolved.section["seed"] + 104_729 * self.number


def make_phases(resolved_runs: list[ResolvedRun]) -> list[Phase]:
    """The phases of a run, in their order."""
    total_steps = sum(resolved.num_steps for resolved in resolved_runs)
    total_samples = sum(resolved.num_steps * resolved.global_batch for resolved in resolved_runs)
    phases, first_step, first_sample = [], 0, 0
    for number, resolved in enumerate(resolved_runs):
        phases.append(Phase(number, len(resolved_runs), resolved, first_step, first_sample, total_steps, total_samples))
        first_step += resolved.num_steps
        first_sample += resolved.num_steps * resolved.global_batch
    return phases


def resolve(recipe: dict[str, Any], *, num_samples: int, world_size: int, output: str) -> ResolvedRun:
    """Fills in every "auto" from the data set and the batch, and stretches the lengths by ``schedule_stretch``.

    Args:
        recipe: of one phase; see section.phase_recipes.
        num_samples: in the training set.
        output: folder of the run, for the TensorBoard log.

    Raises:
        ValueError: naming the entry, its value and what is allowed.
    """
    config = copy.deepcopy(recipe)
    check_keys(config)
    section = config["largebatch"] = check_section(config)
    if section["phases"] is not None:
        raise ValueError("largebatch.phases: each phase is resolved by itself; see section.phase_recipes")
    check_baseline(config)
    global_batch = config.get("train_batch_size")
    if not isinstance(global_batch, int) or isinstance(global_batch, bool) or not 1 <= global_batch <= LARGEST_BATCH:
        limits = f">= 1, and at most {LARGEST_BATCH}"
        raise ValueError(f"train_batch_size is {global_batch!r}; expected an integer {limits}: the global batch")
    micro_batch = micro_batch_for(config, world_size)
    accumulation_steps = global_batch // (micro_batch * world_size)
    given = config.get("gradient_accumulation_steps", "auto")
    if given not in ("auto", accumulation_steps):
        raise ValueError(
            f"gradient_accumulation_steps is {given!r}; expected {accumulation_steps} = train_batch_size {global_batch} / "
            f'(micro-batch {micro_batch} x {world_size} ranks), or "auto"'
        )
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulation_steps
    stretch_lengths(config)
    steps_per_epoch = num_samples / global_batch
    num_steps = section["steps"] or max(1, math.ceil(section["epochs"] * steps_per_epoch - 1e-9))
    if num_steps > LONGEST:
        length = {name: section[name] for name in ("epochs", "steps") if section[name] is not None}
        raise ValueError(f"largebatch has a length of {length}, {num_steps:.3g} steps; expected at most {LONGEST}")
    if section["layer_stats_every_steps"] == "auto":
        section["layer_stats_every_steps"] = max(1, num_steps // 100)
    fill_accumulation(config, accumulation_steps)
    fill_optimizer(config, section, global_batch)
    fill_scheduler(config, num_steps, steps_per_epoch)
    tensorboard = {"enabled": True, "output_path": os.path.abspath(output), "job_name": "tensorboard"}
    config["tensorboard"] = tensorboard | config.get("tensorboard", {})
    config.setdefault("steps_per_print", 10**9)
    # DeepSpeed's own throughput timer waits for the device twice a micro-step
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    return ResolvedRun(config, int(num_steps), global_batch, micro_batch, accumulation_steps)


def stretch_lengths(config: dict[str, Any]) -> None:
    """Multiplies the length of training and all lengths of its schedule by ``schedule_stretch``, which becomes 1.

    arXiv:1708.03888 asks with it how many more steps a large batch needs; Composer calls it scale_schedule_ratio.
    """
    section = config["largebatch"]
    stretch, section["schedule_stretch"] = section["schedule_stretch"], 1.0
    if stretch == 1:
        return
    if section["steps"] is not None:
        section["steps"] = max(1, round(section["steps"] * stretch))
    else:
        section["epochs"] *= stretch
    scheduler = config.get("scheduler", {})
    if scheduler and scheduler.get("type") not in SCHEDULERS:
        raise ValueError(
            f"largebatch.schedule_stretch is {stretch} and scheduler.type {scheduler.get('type')!r}; expected one of "
            f"{', '.join(SCHEDULERS)}, whose lengths it knows. Leave it out, and change the lengths yourself"
        )
    params = scheduler.get("params") or {}
    for name in LENGTHS:
        value = params.get(name)
        if isinstance(value, (list, tuple)):
            params[name] = [milestone * stretch for milestone in value]
        elif is_number(value):
            params[name] = value * stretch


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
