"""The names of DeepSpeed that largebatch reads, by version: the only place where they are looked up.

Each has the places in which some supported version keeps it, the newest first. What not every version has is optional, and has
a value that stands for "not there". Attributes of single engines and wrappers are read in largebatch.engine.wrappers.

What differs between the releases that are supported, each asked by what is there and not by version number:

| from   | what                                                                | until then                                |
|--------|---------------------------------------------------------------------|-------------------------------------------|
| 0.17.0 | runtime/precision_config.py: models of "fp16" and "bf16"            | entries are looked up one by one          |
| 0.17.6 | engine.zenflow, or shortly before                                   | no ZenFlow                                |
| 0.18.3 | stage 2 adds up micro-batches again, as before 0.17.6              | see lost_micro_batches                    |
| 0.18.3 | engine.backward scales the loss itself, for ZeRO wrappers only      | the wrapper scales it, at stage 0, too    |
| 0.18.6 | FP16_UnfusedOptimizer.loss_scale_config holds the loss scale        | the wrapper itself holds it               |
| 0.18.6 | bf16 at stage 0 trains                                              | see replacements.refuse_faulty_bf16       |
| 0.19.0 | stage 2 with offload adds up all micro-batches                      | see lost_micro_batches                    |
| 0.19.3 | sub_group_process_groups: a process group for each ZeRO-3 sub-group | dp_process_group for all                  |
| 0.19.7 | round_robin_bit16_offsets: padding between layers in ZeRO 1 and 2   | layers lie one after another              |
| 0.19.7 | tables of removed configuration keys                                | no keys are removed                       |

A layout that none of this describes is found by largebatch.engine.wrappers.verify.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TESTED_DEEPSPEED = ("0.19.8",)
"""Versions under which the test suite has passed."""

MISSING = object()


@dataclass(frozen=True)
class Internal:
    """A name of DeepSpeed's.

    Attributes:
        places: "module:attribute" or "module:Class.attribute", the newest version's first.
        default: its value where no place has it; MISSING: it must be there.
    """

    places: tuple[str, ...]
    default: Any = MISSING

    def find(self) -> Any:
        return next((value for place in self.places if (value := value_at(place)) is not MISSING), self.default)


def at(*places: str, default: Any = MISSING) -> Internal:
    return Internal(tuple(f"deepspeed.{place}" for place in places), default)


def engine_method(name: str) -> Internal:
    return at(f"runtime.engine:DeepSpeedEngine.{name}")


INTERNALS: dict[str, Internal] = {
    "get_accelerator": at("accelerator:get_accelerator"),
    "logger": at("utils:logger"),
    "zero_utils": at("runtime.zero:utils"),
    "lr_schedules": at("runtime:lr_schedules"),
    "known_schedules": at("runtime.lr_schedules:VALID_LR_SCHEDULES"),
    "known_optimizers": at("runtime.config:DEEPSPEED_OPTIMIZERS"),
    "PipelineModule": at("runtime.pipe.module:PipelineModule"),
    "CreateLossScaler": at("runtime.fp16.loss_scaler:CreateLossScaler"),
    # made when first read, which takes seconds: for the trainer only
    "compatible_ops": at("ops:__compatible_ops__", default={}),
    # the models (pydantic) of a ds_config's sections
    "ZeroStageEnum": at("runtime.zero.config:ZeroStageEnum"),
    "DeepSpeedZeroConfig": at("runtime.zero.config:DeepSpeedZeroConfig"),
    "DeepSpeedFP16Config": at("runtime.precision_config:DeepSpeedFP16Config", default=None),
    "DeepSpeedBF16Config": at("runtime.precision_config:DeepSpeedBF16Config", default=None),
    "TensorBoardConfig": at("monitor.config:TensorBoardConfig"),
    "WandbConfig": at("monitor.config:WandbConfig"),
    "CSVConfig": at("monitor.config:CSVConfig"),
    "CometConfig": at("monitor.config:CometConfig", default=None),
    "CommsLoggerConfig": at("comm.config:CommsLoggerConfig"),
    "CompileConfig": at("compile.config:CompileConfig", default=None),
    "HybridEngineConfig": at("runtime.config:HybridEngineConfig", default=None),
    "TPTrainingConfig": at("runtime.tensor_parallel.config:TPTrainingConfig", default=None),
    "WeightQuantConfig": at("inference.config:WeightQuantConfig", default=None),
    "DeepSpeedThroughputTimerConfig": at("utils.config:DeepSpeedThroughputTimerConfig", default=None),
    # there if engine.backward scales the loss itself
    "scale_if_loss": at("runtime.base_optimizer:ZeROOptimizer.scale_if_loss", default=None),
    # entries that a version knows and has not any more, with what it says of them
    "removed_entries": at("runtime.config:_REMOVED_TOP_LEVEL_CONFIG_KEYS", default={}),
    "removed_zero_entries": at("runtime.config:_REMOVED_ZERO_CONFIG_KEYS", default={}),
    # what is called of an engine
    **{
        name: engine_method(name)
        for name in (
            "optimizer_name",
            "optimizer_params",
            "zero_use_cpu_optimizer",
            "gradient_clipping",
            "fp16_enabled",
            "bfloat16_enabled",
            "zero_optimization_stage",
            "loss_scale",
            "dynamic_loss_scale_args",
            "load_universal_checkpoint",
            "random_ltd_enabled",
            "curriculum_learning_enabled",
            "_get_optimizer_param",
            "backward",
        )
    },
}
"""Our word -> where DeepSpeed keeps it."""

NEWER_ENTRIES: dict[str, str] = {
    "managed_gradient_accumulation": "runtime.constants:MANAGED_GRADIENT_ACCUMULATION",
    "gradient_allreduce_op": "runtime.constants:GRADIENT_ALLREDUCE_OP",
    "disable_python_gc": "runtime.constants:DISABLE_PYTHON_GC",
    "expert_parallel": "runtime.config:EXPERT_PARALLEL",
    "datastates_ckpt": "datastates.config:DATASTATES_CHECKPOINTING",
    "torch_autocast": "runtime.constants:TORCH_AUTOCAST",
    "torch_autocast.lower_precision_safe_modules": "runtime.constants:TORCH_AUTOCAST_LOWER_PRECISION_SAFE_MODULES",
    "checkpoint.checkpoint_serialization": "runtime.model_checkpointing.constants:CHECKPOINT_SERIALIZATION",
    "checkpoint.writer": "runtime.model_checkpointing.constants:CHECKPOINT_WRITER",
    "data_types.param_dtype": "runtime.constants:PARAM_DTYPE",
    "data_types.buffer_dtype": "runtime.constants:BUFFER_DTYPE",
    "data_types.keep_in_fp32_modules": "runtime.constants:KEEP_IN_FP32_MODULES",
}
"""Entry of a ds_config without a model, which not every supported version reads -> the constant that holds its name there."""


def internal(name: str) -> Any:
    """A name of :data:`INTERNALS`, or its default.

    Raises:
        RuntimeError: this DeepSpeed has it nowhere.
    """
    value = INTERNALS[name].find()
    if value is MISSING:
        raise RuntimeError(lacks([INTERNALS[name].places[0]]))
    return value


def refuse_newer_entry(entry: str) -> None:
    """Raises ValueError for one that the DeepSpeed at hand would ignore."""
    if entry in NEWER_ENTRIES and at(NEWER_ENTRIES[entry]).find() is MISSING:
        raise ValueError(
            f"{entry} is not known to DeepSpeed {installed_version()}, which would ignore it. Remove it, or install a newer version"
        )


def missing(internals: Mapping[str, Internal]) -> list[str]:
    """The places of those that must be there and are not."""
    needed = [one for one in internals.values() if one.default is MISSING]
    return [one.places[0] for one in needed if one.find() is MISSING]


def owner_of(place: str) -> tuple[Any, str]:
    """The module or class that has what stands at "module:attribute" or "module:Class.attribute", and its name there.

    Raises:
        ImportError, AttributeError: there is no such module or class.
    """
    module, _, path = place.partition(":")
    *classes, name = path.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), name


def value_at(place: str) -> Any:
    """MISSING if there is nothing."""
    try:
        return getattr(*owner_of(place))
    except (ImportError, AttributeError):
        return MISSING


class DeepSpeedFaultError(ValueError):
    """What is asked for cannot be exact with the installed DeepSpeed, whose fault it is; says what to write instead."""


def installed_version() -> str:
    import deepspeed

    return deepspeed.__version__


def versions() -> str:
    """The DeepSpeed at hand, and those that are tested."""
    return f"DeepSpeed {installed_version()} (largebatch is tested with {', '.join(TESTED_DEEPSPEED)})"


def is_tested() -> bool:
    return installed_version().split("+")[0] in TESTED_DEEPSPEED


def lacks(places: list[str]) -> str:
    """The error for what is not there."""
    return (
        f"{versions()} lacks {', '.join(place.replace(':', '.') for place in places)}, which largebatch needs. Install a tested "
        "version, or use largebatch.LARS and LAMB without register()"
    )
