"""Entries of a ds_config that have to agree with each other, with the device, or with what is installed."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import lr_scheduler

from largebatch.config import check_option_names, integer, nearest_hint, reject
from largebatch.engine.internals import internal
from largebatch.engine.lr_schedulers import SCHEDULERS
from largebatch.optim.registry import OPTIMIZERS

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Section -> the package without which it cannot be enabled."""


def check_batches(config: Mapping[str, Any], world_size: int | None) -> None:
    """The global batch is micro-batch x accumulation steps x ranks; what is not given follows from the rest."""
    total, micro, steps = (
        config.get(name) for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )  # fmt: skip
    if total is None and micro is None:
        raise ValueError(
            "the ds_config has neither train_batch_size nor train_micro_batch_size_per_gpu; expected at least one of them"
        )
    if world_size is None or total is None:
        return
    unit = (micro or 1) * (steps or 1) * world_size
    if total % unit or (micro and steps and total != unit):
        raise ValueError(
            f"train_batch_size is {total}, train_micro_batch_size_per_gpu {micro} and gradient_accumulation_steps {steps} on "
            f"{world_size} ranks; expected train_batch_size = micro-batch x accumulation steps x ranks, here "
            f"{'' if micro and steps else 'a multiple of '}{unit}. Change one of them, or leave one out"
        )


def check_parallelism(config: Mapping[str, Any], num_ranks: int | None) -> None:
    """Ranks that share a model, or a sequence, against all ranks of the job."""
    size = config.get("tensor_parallel", {}).get("autotp_size", 0)
    integer(0)("tensor_parallel.autotp_size", size)
    if size and num_ranks is not None and num_ranks % size:
        reject("tensor_parallel.autotp_size", size, f"a divisor of the number of ranks, {num_ranks}, or 0 for none")
    replicas, sequences = config.get("data_parallel_size"), config.get("sequence_parallel_size")
    if None not in (replicas, sequences, num_ranks) and replicas * sequences != num_ranks:  # type: ignore[operator]
        raise ValueError(
            f"data_parallel_size is {replicas} and sequence_parallel_size {sequences} on {num_ranks} ranks; expected two sizes "
            "whose product is the number of ranks. Change one of them, or leave both out"
        )


def check_precision(config: Mapping[str, Any]) -> None:
    accelerator = internal("get_accelerator")()
    is_on = {name: config.get(name, {}).get("enabled") is True for name in ("fp16", "bf16", "bfloat16")}
    if is_on["fp16"] and (is_on["bf16"] or is_on["bfloat16"]):
        raise ValueError("fp16.enabled and bf16.enabled are both true; enable one of them")
    device = accelerator.device_name()
    if is_on["fp16"] and not accelerator.is_fp16_supported():
        raise ValueError(f"fp16.enabled is true and this {device} cannot compute in fp16; use bf16, or neither")
    if (is_on["bf16"] or is_on["bfloat16"]) and not accelerator.is_bf16_supported():
        raise ValueError(f"bf16.enabled is true and this {device} cannot compute in bf16; use fp16, or neither")
    compute = next((name[:4] for name, on in is_on.items() if on), "fp32").replace("bflo", "bf16")
    accumulation = config.get("data_types", {}).get("grad_accum_dtype") or compute
    if stage_of(config) == 0 and accumulation != compute:
        raise ValueError(
            f"data_types.grad_accum_dtype is {accumulation!r} with zero_optimization.stage 0 and {compute}; DeepSpeed accumulates "
            "in the compute type there. Leave it out, or set the stage to 1"
        )
    for name in ("fp16", "bf16", "bfloat16"):
        for key in (f"{name[:4].replace('bflo', 'bf16')}_master_weights_and_grads", "bf16_optimizer_states"):
            if config.get(name, {}).get(key) is True:
                raise ValueError(
                    f"{name}.{key} is true; DeepSpeed has that for its own Adam on the CPU only. Leave it out: the masters of other "
                    "optimizers are fp32"
                )
    if config.get("fp16", {}).get("initial_scale_power", 16) not in ("auto", *range(1024)):
        reject("fp16.initial_scale_power", config["fp16"]["initial_scale_power"], "a whole number from 0 to 1023")


def check_stage(config: Mapping[str, Any]) -> None:
    zero, stage = config.get("zero_optimization", {}), stage_of(config)
    if zero.get("legacy_stage1") is True:
        raise ValueError(
            "zero_optimization.legacy_stage1 is true; expected false: DeepSpeed no longer has it. Leave it out"
        )
    if stage >= 2 and zero.get("reduce_scatter", True) is not False:
        for key, default in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if config.get(key, default) != default:
                raise ValueError(
                    f"{key} is {config[key]!r} with zero_optimization.stage {stage}; DeepSpeed has that with "
                    '"reduce_scatter": false only. Set that, or leave it out'
                )
    bucket, memory = zero.get("reduce_bucket_size", "auto"), internal("get_accelerator")().total_memory()
    if stage and bucket != "auto" and 2 * bucket > memory:  # elements of two bytes at least
        reject(
            "zero_optimization.reduce_bucket_size",
            bucket,
            f"at most {memory // 2:,}, the elements that this device can hold",
        )


def stage_of(config: Mapping[str, Any]) -> int:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    return 0 if stage == "auto" else stage


def check_offload(config: Mapping[str, Any]) -> None:
    zero, stage = config.get("zero_optimization", {}), stage_of(config)
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        options = zero.get(name) or {}
        device = options.get("device", "none") if isinstance(options, dict) else "none"
        if device in ("none", "auto"):
            continue
        where = f"zero_optimization.{name}"
        if stage < least:
            raise ValueError(
                f"{where}.device is {device!r} with zero_optimization.stage {stage}; expected a stage >= {least}, or no {name}"
            )
        if device == "nvme":
            if stage < 3:
                raise ValueError(
                    f"{where}.device is 'nvme' with zero_optimization.stage {stage}; expected stage 3, or the device 'cpu'"
                )
            if not options.get("nvme_path") or not os.path.isdir(options["nvme_path"]):
                reject(f"{where}.nvme_path", options.get("nvme_path"), "a folder on a local disk that exists")


def check_monitors(config: Mapping[str, Any]) -> None:
    for name, package in MONITORS.items():
        if config.get(name, {}).get("enabled") is True and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{name}.enabled is true and the package {package} is not installed; pip install {package}"
            )


def check_scheduler(config: Mapping[str, Any]) -> None:
    """The type and the names of its options; values of ours are checked when it is built."""
    if "scheduler" not in config:
        return
    entries = config["scheduler"]
    known = list(dict.fromkeys([*SCHEDULERS, *internal("known_schedules")]))
    name = entries.get("type")
    of_torch = vars(lr_scheduler).get(name)
    is_of_torch = isinstance(of_torch, type) and issubclass(of_torch, lr_scheduler.LRScheduler)
    if name not in known and not is_of_torch:
        expected = f"{', '.join(known)}, or under stage 0 in fp32 a class of torch.optim.lr_scheduler"
        reject("scheduler.type", name, expected + nearest_hint(name or "", known))
    if "params" not in entries:
        raise ValueError(f"scheduler.params is missing; expected a section with the options of {name}, {{}} for none")
    is_low_precision = any(config.get(n, {}).get("enabled") is True for n in ("fp16", "bf16", "bfloat16"))
    if name not in known and (stage_of(config) or is_low_precision):
        raise ValueError(
            f"scheduler.type is {name!r}, torch's own, which takes none of the optimizers that DeepSpeed builds for ZeRO, fp16 or "
            f"bf16; expected one of {', '.join(known)}"
        )
    scheduler = SCHEDULERS.get(name) or (getattr(internal("lr_schedules"), name) if name in known else of_torch)
    options = list(inspect.signature(scheduler.__init__).parameters)[2:]
    check_option_names(entries["params"], options, "scheduler.params")
    for key, value in entries["params"].items():
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, float) and not math.isfinite(v):
                reject(f"scheduler.params.{key}", value, "finite numbers")


OTHERS_TYPES = {
    "onebitlamb": 'LAMB (exact under ZeRO; it sends gradients whole, so drop "freeze_step" and what else is about compression)',
    "fusedlamb": 'LAMB with "preset": "apex" (apex\'s formula), or "preset": "deepspeed" (that of DeepSpeed\'s own)',
    "nvlamb": 'LAMB with "preset": "apex" and "adapt_undecayed": true',
    "cpulamb": "LAMB, which runs on CPUs, too",
    "larc": 'LARS with "preset": "apex"',
    "larsw": 'LARS with "decoupled_weight_decay": true',
    "lambw": 'LAMB with "decoupled_weight_decay": true',
}
"""Lower-cased types of other packages, and of DeepSpeed where ours do better -> what to write."""


def check_optimizer_type(name: Any) -> None:
    """Refuses a type that neither we nor DeepSpeed nor torch have.

    Raises:
        ValueError: names what is known and the nearest.
    """
    if isinstance(name, str) and name.lower() in OTHERS_TYPES:
        raise ValueError(f"optimizer.type is {name!r}; write {OTHERS_TYPES[name.lower()]}")
    of_torch = getattr(torch.optim, name, None) if isinstance(name, str) else None
    is_of_torch = (
        isinstance(of_torch, type) and issubclass(of_torch, torch.optim.Optimizer) and of_torch is not torch.optim.Optimizer
    )  # fmt: skip
    if not isinstance(name, str) or (name.lower() not in internal("known_optimizers") and not is_of_torch):
        known = [cls.__name__ for cls in OPTIMIZERS.values()] + ["SGD", "Adam", "AdamW", "Adagrad"]
        hint = nearest_hint(name, known) or nearest_hint(str(name).upper(), known)
        raise ValueError(f"optimizer.type is {name!r}; expected {', '.join(known)}, or a class of torch.optim{hint}")
