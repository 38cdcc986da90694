"""Bytes of memory of one rank in training, by part, as DeepSpeed 0.19.8 allocates them.

Read in its code and checked against the live tensors and the allocator of real engines (tests/engine/test_plan_memory.py,
benchmarks/planner.py). P parameters, W ranks, per parameter:

| wrapper                        | weights | masters | state | gradients | accumulation | bucket   |
| none (stage 0, fp32)           | 4       | -       | s     | 4         | -            | -        |
| FP16_UnfusedOptimizer (0)      | 2       | 4       | s     | 2         | -            | -        |
| BF16_Optimizer (1, bf16)       | 2       | 4/W     | s/W   | 2         | 4            | -        |
| DeepSpeedZeroOptimizer (1, 2)  | 2 or 4  | 4/W     | s/W   | see below | 4 or 4/W     | 2 or 4 B |
| DeepSpeedZeroOptimizer_Stage3  | 2/W, 4/W| 4/W     | s/W   | -         | 4/W          | 4 B      |

s: bytes of optimizer state per parameter; B: reduce_bucket_size in elements, allocated whole, however small the model (the
default of 5e8 elements is 1 to 2 GB). Gradients accumulate in fp32, as the trainer sets it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "fp16")
OFFLOADS = ("none", "optimizer", "optimizer+parameters")

DEFAULT_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, and what stage 0 flattens at a time."""

STATE_BYTES = {
    "sgd": 0, "momentum": 4, "lars": 4, "lamb": 8, "nlamb": 8, "nnlamb": 8, "lans": 8, "adam": 8, "adamw": 8, "adagrad": 4,
}  # fmt: skip
"""Bytes of fp32 optimizer state per parameter; "sgd" is without momentum."""

PARTS = (
    "weights", "masters", "optimizer_state", "gradients", "accumulation_buffer", "bucket", "activations", "workspace",
)  # fmt: skip
"""- gradients: in the compute type, or what the optimizer keeps of the step before.
- accumulation_buffer: fp32 sums over the micro-steps.
- bucket: DeepSpeed's contiguous gradient buffer.
- workspace: copies made while gradients are reduced or the optimizer steps, and weights gathered by stage 3.
"""


@dataclass(frozen=True)
class Layout:
    """How training is laid out over ranks.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        precision: "fp32", "bf16" or "fp16".
        world_size: ranks that share the states.
        offload: "none", "optimizer" (stages 1 to 3) or "optimizer+parameters" (stage 3).
        bucket_elements: reduce_bucket_size.
    """

    stage: int
    precision: str
    world_size: int
    offload: str = "none"
    bucket_elements: int = DEFAULT_BUCKET_ELEMENTS

    def __post_init__(self):
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"the ZeRO stage is {self.stage!r}; expected 0, 1, 2 or 3")
        if self.precision not in PRECISIONS:
            raise ValueError(f"the precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.world_size < 1 or self.bucket_elements < 1:
            raise ValueError(f"{self.world_size} ranks and a bucket of {self.bucket_elements} elements; expected >= 1")
        if self.offload not in OFFLOADS:
            raise ValueError(f"offload is {self.offload!r}; expected one of {', '.join(OFFLOADS)}")
        if (self.offload != "none" and self.stage == 0) or (self.offload == OFFLOADS[2] and self.stage != 3):
            raise ValueError(
                f"DeepSpeed has no offload {self.offload!r} at stage {self.stage}; the optimizer's starts at stage 1, that of the "
                "parameters at stage 3"
            )

    @property
    def bytes_per_weight(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def wrapper(self) -> str:
        """DeepSpeed's class around the optimizer."""
        if self.stage == 0:
            return "none" if self.precision == "fp32" else "FP16_UnfusedOptimizer"
        if self.stage == 1 and self.precision == "bf16" and self.offload == "none":
            return "BF16_Optimizer"
        return "DeepSpeedZeroOptimizer_Stage3" if self.stage == 3 else "DeepSpeedZeroOptimizer"


@dataclass(frozen=True)
class Memory:
    """The worst moment of a step.

    Attributes:
        device, host: part (see PARTS) -> bytes, on the accelerator and in the machine's memory, for one rank.
        moment: "backward", "reduction" or "step".
    """

    device: dict[str, int]
    host: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """Bytes on the accelerator."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def memory(
    layers: Sequence[int],
    layout: Layout,
    *,
    optimizer: str,
    activations: int,
    accumulation_steps: int = 3,
    state_bytes: int | None = None,
) -> Memory:
    """Bytes of one rank at the worst moment of a step.

    Args:
        layers: elements of each trainable parameter, in the model's order.
        optimizer: a key of STATE_BYTES.
        activations: bytes that forward and backward of a micro-batch need beyond weights and gradients.
        accumulation_steps: micro-steps of an optimizer step.
        state_bytes: per parameter, where it is not the optimizer's usual one.
    """
    if optimizer not in STATE_BYTES:
        raise ValueError(f"the optimizer is {optimizer!r}; the state of {', '.join(STATE_BYTES)} is known")
    device = dict.fromkeys(PARTS, 0)
    host: dict[str, int] = {}
    num_parameters, largest = sum(layers), max(layers)
    partition = -(-num_parameters // layout.world_size)
    shard = num_parameters if layout.stage == 0 else partition
    is_low, is_offloaded = layout.precision != "fp32", layout.offload != "none"
    width = layout.bytes_per_weight

    device["weights"] = width * (partition if layout.stage == 3 else num_parameters)
    states = {"masters": 4 * shard, "optimizer_state": (state_bytes or STATE_BYTES[optimizer]) * shard}
    if layout.wrapper == "none":
        states["masters"] = 0
    (host if is_offloaded else device).update(states)
    add_gradients(device, host, layers, layout)
    if layout.offload == OFFLOADS[2]:
        host["weights"], device["weights"] = device["weights"], 0

    moments = {
        "backward": {"activations": activations, "workspace": gathered_weights(layout, num_parameters)},
        "reduction": reduction_workspace(layout, layers, activations, accumulation_steps),
        "step": {"workspace": step_workspace(layout, num_parameters, min(largest, shard), shard)},
    }
    if layout.wrapper == "DeepSpeedZeroOptimizer":
        moments["step"]["bucket"] = 0  # given back after the reduction
    moment = max(moments, key=lambda name: sum((device | moments[name]).values()))
    if is_low and is_offloaded and layout.stage < 3:
        host["workspace"] = 2 * partition + 2 * largest
    return Memory(device | moments[moment], host, moment)


def add_gradients(device: dict[str, int], host: dict[str, int], layers: Sequence[int], layout: Layout) -> None:
    """What is held from micro-step to micro-step: gradients, their fp32 sums and DeepSpeed's bucket."""
    num_parameters = sum(layers)
    partition = -(-num_parameters // layout.world_size)
    is_low, is_offloaded = layout.precision != "fp32", layout.offload != "none"
    if layout.stage == 0:
        device["gradients"] = layout.bytes_per_weight * num_parameters
    elif layout.wrapper == "BF16_Optimizer":
        device["gradients"], device["accumulation_buffer"] = 2 * num_parameters, 4 * num_parameters
    elif layout.stage == 1:
        device["gradients" if not is_low else "accumulation_buffer"] = 4 * num_parameters
        device["bucket"] = 4 * layout.bucket_elements
    elif layout.stage == 2:
        owned = 4 * (partition if is_low else largest_owned(layers, layout.world_size))
        (host if is_offloaded else device)["accumulation_buffer"] = owned
        device["bucket"] = layout.bytes_per_weight * layout.bucket_elements
    else:
        (host if is_offloaded else device)["accumulation_buffer"] = 4 * partition
        device["bucket"] = 4 * layout.bucket_elements
    if is_offloaded:
        host["gradients"] = 4 * partition


def largest_owned(layers: Sequence[int], world_size: int) -> int:
    """Elements of all layers that reach into the partition of a rank, for the rank with most: fp32 keeps them whole."""
    partition = -(-sum(layers) // world_size)
    ends = list(itertools.accumulate(layers))
    starts = [end - size for end, size in zip(ends, layers, strict=True)]
    return max(
        sum(
            size
            for start, end, size in zip(starts, ends, layers, strict=True)
            if start < (r + 1) * partition and end > r * partition
        )
        for r in range(world_size)
    )


def gathered_weights(layout: Layout, num_parameters: int) -> int:
    """Bytes of whole weights that stage 3 gathers; by default it keeps up to 1e9 parameters of a micro-step alive."""
    return layout.bytes_per_weight * min(num_parameters, 1_000_000_000) if layout.stage == 3 else 0


def reduction_workspace(
    layout: Layout, layers: Sequence[int], activations: int, accumulation_steps: int
) -> dict[str, int]:
    """While gradients go over the ranks. A bucket smaller than the model is sent while activations are still held."""
    num_parameters, largest = sum(layers), max(layers)
    bucket = min(layout.bucket_elements, num_parameters)
    width = layout.bytes_per_weight
    if layout.stage == 0:
        return {"workspace": width * min(num_parameters, DEFAULT_BUCKET_ELEMENTS)}
    if layout.wrapper == "BF16_Optimizer":
        return {"workspace": 4 * largest}  # a gradient in fp32, on its way to the sums
    if layout.stage == 1:
        return {"workspace": 4 * largest if width == 4 else 2 * num_parameters}
    # flattened, and again in fp32 where it is not
    copies = 4 * bucket + (2 * bucket if width == 2 else 0)
    if layout.stage == 2 and width == 4 and accumulation_steps > 1:
        copies += 4 * largest_owned(layers, layout.world_size)  # this micro-step's, before they are added to the sums
    copies += gathered_weights(layout, num_parameters)
    if bucket == num_parameters:
        return {"workspace": copies}
    # backward goes on meanwhile: the gradient that overfills the bucket is one of the activations, which hold what autograd
    # returned; beside it lies its copy, in fp32 or as the weights are laid out. Stage 3 is left one more in fp32: the buffer
    # through which its weights are gathered is counted nowhere
    beside = 4 * largest if layout.stage == 2 else 2 * width * largest
    return {"activations": activations, "workspace": copies + beside}


def step_workspace(layout: Layout, num_parameters: int, largest_fragment: int, shard: int) -> int:
    """fp64 copies for the gradients' norm, or fp32 gradients where they are in 16 bits until then."""
    if layout.wrapper == "FP16_UnfusedOptimizer":
        return 4 * num_parameters
    if layout.stage == 0 or layout.offload != "none" or layout.wrapper == "BF16_Optimizer":
        return 0
    return max(8 * largest_fragment, 4 * shard if layout.stage == 3 else 0)
