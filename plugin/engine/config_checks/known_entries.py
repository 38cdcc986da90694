"""What DeepSpeed's engine looks up in a ds_config without a model of its own, and what is allowed there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from largebatch.config import (
    NON_NEGATIVE,
    POSITIVE,
    Check,
    boolean,
    check_option_names,
    integer,
    number,
    one_of,
    reject,
)


def section(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        reject(name, value, "a section (JSON object)", TypeError)


def text(name: str, value: Any) -> None:
    if not isinstance(value, str) or "\0" in value:
        reject(name, value, "a text", TypeError)


def or_none(check: Check) -> Check:
    def check_or_none(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_or_none


def any_case(*choices: str) -> Check:
    """A name that DeepSpeed takes in any spelling."""

    def check(name: str, value: Any) -> None:
        one_of(*choices)(name, value.lower() if isinstance(value, str) else value)

    return check


COUNT = integer(1)


def count_or_never(name: str, value: Any) -> None:
    """Accelerate writes infinity for "never"."""
    if value != math.inf:
        COUNT(name, value)


DTYPE = one_of("fp32", "fp16", "bf16")


def table(checks: dict[str, Check]) -> Check:
    """A section within a section."""

    def check(name: str, value: Any) -> None:
        section(name, value)
        check_entries(name, value, checks)

    return check


CHECKPOINT_WRITER = table(
    {
        "type": any_case("mock", "python", "fast"),
        "io_buffer_size": COUNT,
        "io_buffer_double": boolean,
        "io_multiplier": COUNT,
        "show_statistics": boolean,
        "data_parallel": or_none(any_case("replica", "socket", "machine")),
        "decoupled": boolean,
    }
)

TOP_LEVEL: dict[str, Check] = {
    "largebatch": section,
    "optimizer": section,
    "scheduler": section,
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "gradient_accumulation_steps": COUNT,
    "managed_gradient_accumulation": boolean,
    "gradient_clipping": number("a number >= 0; 0 is off", lambda x: x >= 0),
    "steps_per_print": or_none(count_or_never),
    "communication_data_type": or_none(any_case("fp32", "fp16", "bf16")),
    "seq_parallel_communication_data_type": or_none(any_case("fp32", "fp16", "bf16")),
    "prescale_gradients": boolean,
    "gradient_predivide_factor": POSITIVE,
    "gradient_allreduce_op": any_case("mean", "sum"),
    "zero_allow_untested_optimizer": boolean,
    "zero_force_ds_cpu_optimizer": boolean,
    "wall_clock_breakdown": boolean,
    "memory_breakdown": boolean,
    "dump_state": boolean,
    "disable_allgather": boolean,
    "disable_python_gc": boolean,
    "dataloader_drop_last": boolean,
    "use_data_before_expert_parallelism": boolean,
    "vocabulary_size": or_none(COUNT),
    "log_level": or_none(one_of("debug", "info", "warning", "error", "critical")),
    "sequence_parallel_size": COUNT,
    "data_parallel_size": COUNT,
    **dict.fromkeys(
        ("timers", "pipeline", "data_efficiency", "autotuning", "expert_parallel", "datastates_ckpt", "tensor_parallel"), section
    ),
}  # fmt: skip
"""Top-level key -> what is allowed, for those that have neither a model of DeepSpeed's nor a table in SECTIONS."""

SECTIONS: dict[str, dict[str, Check]] = {
    "activation_checkpointing": {
        "partition_activations": boolean,
        "number_checkpoints": or_none(COUNT),
        "contiguous_memory_optimization": boolean,
        "synchronize_checkpoint_boundary": boolean,
        "profile": boolean,
        "cpu_checkpointing": boolean,
    },
    "flops_profiler": {
        "enabled": boolean,
        "recompute_fwd_factor": NON_NEGATIVE,
        "profile_step": COUNT,
        "module_depth": integer(-1),
        "top_modules": COUNT,
        "detailed": boolean,
        "output_file": or_none(text),
    },
    "aio": {
        "block_size": COUNT,
        "queue_depth": COUNT,
        "intra_op_parallelism": COUNT,
        "thread_count": COUNT,  # Lightning 2.6 still writes intra_op_parallelism's older name; DeepSpeed ignores it
        "single_submit": boolean,
        "overlap_events": boolean,
        "use_gds": boolean,
    },
    "checkpoint": {
        "tag_validation": any_case("ignore", "warn", "fail"),
        "load_universal": boolean,
        "use_node_local_storage": boolean,
        "parallel_write": table({"pipeline_stage": boolean}),
        "checkpoint_serialization": boolean,
        "writer": or_none(CHECKPOINT_WRITER),
    },
    "data_types": {
        "grad_accum_dtype": or_none(DTYPE),
        "param_dtype": or_none(DTYPE),
        "buffer_dtype": or_none(DTYPE),
        "keep_in_fp32_modules": lambda name, value: None,
    },
    "torch_autocast": {
        "enabled": boolean,
        "dtype": one_of("bfloat16", "float16", "bf16", "fp16"),
        "lower_precision_safe_modules": lambda name, value: None,
    },
    "optimizer": {"type": text, "params": or_none(section), "legacy_fusion": boolean},
    "scheduler": {"type": text, "params": section},
}
"""Section -> key -> what is allowed."""


BF16: dict[str, Check] = {"enabled": boolean, "immediate_grad_update": boolean}
PRECISION_SECTIONS: dict[str, dict[str, Check]] = {
    "fp16": {
        "enabled": boolean,
        "auto_cast": boolean,
        "loss_scale": NON_NEGATIVE,
        "initial_scale_power": integer(0),
        "loss_scale_window": COUNT,
        "hysteresis": COUNT,
        "consecutive_hysteresis": boolean,
        "min_loss_scale": NON_NEGATIVE,
        "fp16_master_weights_and_grads": boolean,
    },
    "bf16": BF16,
    "bfloat16": BF16,
}
"""As SECTIONS, for DeepSpeed before 0.17, which has no models of these."""


def check_entries(name: str, entries: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    check_option_names(entries, list(checks), name)
    for key, value in entries.items():
        checks[key](f"{name}.{key}", value)
