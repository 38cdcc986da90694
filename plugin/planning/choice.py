"""Chooses ZeRO stage, offload and micro-batch for a global batch and a memory, and puts the figures of a plan together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from largebatch.planning.communication import Cluster, Traffic, communication_seconds, traffic
from largebatch.planning.memory import DEFAULT_BUCKET_ELEMENTS, OFFLOADS, Layout, Memory, memory

RESERVE = 0.08
"""Share of a GPU's memory kept for the CUDA context, libraries and fragmentation."""

LARGEST_MICRO_BATCH = 256
"""As the trainer's automatic one; beyond it, throughput hardly grows."""

EFFICIENT_MICRO_BATCH = 8
"""Where the share of a rank allows, a higher ZeRO stage is preferred to smaller micro-batches than this."""

SMALLEST_BUCKET = 25_000_000
"""Elements: large enough for the network, and 150 MB of copies where DeepSpeed's default makes 3 GB."""

PREFERENCE = (
    (0, "none"), (1, "none"), (2, "none"), (3, "none"),
    (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, OFFLOADS[2]),
)  # fmt: skip
"""ZeRO stage and offload in the order of their communication: stages 2 and 3 reduce at every micro-step, and offload
crosses the host's bus."""


@dataclass(frozen=True)
class Demand:
    """What is to be trained.

    Attributes:
        layers: elements of each trainable parameter, in the model's order.
        optimizer: a key of memory.STATE_BYTES.
        activations: micro-batch -> bytes.
        state_bytes: of the optimizer per parameter, where it is not the usual; None: it is.
    """

    layers: tuple[int, ...]
    optimizer: str
    precision: str
    activations: Callable[[int], int]
    global_batch: int
    world_size: int
    state_bytes: int | None = None

    @property
    def num_parameters(self) -> int:
        return sum(self.layers)

    @property
    def bucket_elements(self) -> int:
        """The reduce_bucket_size that is planned: no larger than the model, no smaller than a layer."""
        return min(self.num_parameters, max(max(self.layers), SMALLEST_BUCKET), DEFAULT_BUCKET_ELEMENTS)

    def layout(self, stage: int, offload: str) -> Layout:
        return Layout(stage, self.precision, self.world_size, offload, self.bucket_elements)

    def accumulation_steps(self, micro_batch: int) -> int:
        return self.global_batch // (self.world_size * micro_batch)

    def memory(self, layout: Layout, micro_batch: int) -> Memory:
        return memory(
            self.layers,
            layout,
            optimizer=self.optimizer,
            activations=self.activations(micro_batch),
            accumulation_steps=self.accumulation_steps(micro_batch),
            state_bytes=self.state_bytes,
        )

    def traffic(self, layout: Layout, micro_batch: int) -> list[Traffic]:
        steps = self.accumulation_steps(micro_batch)
        return traffic(self.layers, layout, optimizer=self.optimizer, accumulation_steps=steps)


@dataclass(frozen=True)
class Choice:
    """Attributes: reason: one line on why."""

    layout: Layout
    micro_batch: int
    memory: Memory
    reason: str


def choose(
    demand: Demand,
    micro_batches: Sequence[int],
    *,
    gpu_memory: int | None,
    stage: int | None = None,
    offload: str | None = None,
    micro_batch: int | None = None,
) -> Choice:
    """The cheapest layout in communication that fits, with the largest micro-batch that fits it.

    Args:
        micro_batches: that divide a rank's share, ascending.
        gpu_memory: bytes of a GPU; None: no bound.
        stage, offload, micro_batch: given by the user; None: free.

    Raises:
        ValueError: nothing fits; says which part is too large and what would fit.
    """
    options = [
        (s, o)
        for s, o in PREFERENCE
        if (stage is None or s == stage)
        and (offload is None or o == offload)
        and is_supported(demand, s, micro_batches)
    ]
    if not options:
        raise ValueError(
            f"there is no plan with ZeRO stage {'auto' if stage is None else stage}, offload {offload or 'auto'} and "
            f"{demand.precision}: stage 0 has no offload and cannot accumulate in 16 bits, and only stage 3 offloads parameters"
        )
    candidates = (
        [micro_batch] if micro_batch else [m for m in micro_batches if m <= LARGEST_MICRO_BATCH] or micro_batches[:1]
    )
    if gpu_memory is None:
        layout = demand.layout(*next((o for o in options if o[0] > 0), options[0]))
        largest = candidates[-1]
        reason = f"the largest micro-batch up to {LARGEST_MICRO_BATCH} that divides a rank's share; no memory was given"
        return Choice(layout, largest, demand.memory(layout, largest), "as given" if micro_batch else reason)
    budget = gpu_memory * (1 - RESERVE)
    enough = min(EFFICIENT_MICRO_BATCH, candidates[-1])
    best: tuple[Layout, int] | None = None
    for option in options:
        layout = demand.layout(*option)
        largest = max((m for m in candidates if demand.memory(layout, m).total <= budget), default=0)
        if largest and (best is None or largest > best[1]):
            best = layout, largest
        if largest >= enough:
            break
    if best is None:
        raise ValueError(does_not_fit(demand, options, candidates, micro_batches, gpu_memory))
    layout, largest = best
    reason = (
        f"the least communication that fits {gigabytes(gpu_memory)} less {RESERVE:.0%}, with the largest micro-batch "
        f"up to {LARGEST_MICRO_BATCH}"
    )
    return Choice(layout, largest, demand.memory(layout, largest), reason)


def is_supported(demand: Demand, stage: int, micro_batches: Sequence[int]) -> bool:
    """Stage 0 adds 16-bit gradients up in 16 bits, which the trainer refuses; its share must fit one micro-batch."""
    if stage > 0 or demand.precision == "fp32":
        return True
    return demand.global_batch // demand.world_size in micro_batches and demand.global_batch <= (
        LARGEST_MICRO_BATCH * demand.world_size
    )


def does_not_fit(
    demand: Demand,
    options: Sequence[tuple[int, str]],
    candidates: Sequence[int],
    micro_batches: Sequence[int],
    gpu_memory: int,
) -> str:
    """The message: what the smallest of the tried plans needs, its largest part, and what would fit."""
    tried = [(demand.layout(*option), m) for option in options for m in candidates]
    layout, micro_batch = min(tried, key=lambda t: demand.memory(*t).total)
    needed = demand.memory(layout, micro_batch)
    part, size = max(needed.device.items(), key=lambda item: item[1])
    parts = ", ".join(f"{name.replace('_', ' ')} {gigabytes(n)}" for name, n in needed.device.items() if n)
    remedies = remedies_for(demand, layout, micro_batch, micro_batches, gpu_memory * (1 - RESERVE))
    return (
        f"{gigabytes(gpu_memory)} a GPU, {RESERVE:.0%} of it in reserve, is too little: micro-batch {micro_batch}, ZeRO stage "
        f"{layout.stage}, offload {layout.offload} needs {gigabytes(needed.total)} ({parts}), most of it {part.replace('_', ' ')}, "
        f"{gigabytes(size)}. {remedies}"
    )


def remedies_for(demand: Demand, layout: Layout, micro_batch: int, micro_batches: Sequence[int], budget: float) -> str:
    smaller = [m for m in micro_batches if m < micro_batch and demand.memory(layout, m).total <= budget]
    found = [f"--micro-batch {smaller[-1]}"] if smaller else []
    for stage, offload in PREFERENCE:
        if stage < max(layout.stage, 1):
            continue
        other = demand.layout(stage, offload)
        if demand.memory(other, micro_batch).total <= budget:
            found.append(f"--zero-stage {stage}" + (f" --offload {offload}" if offload != "none" else ""))
    if found:
        return f"These fit: {'; '.join(found[:4])}"
    smallest = min(demand.memory(demand.layout(s, o), micro_batches[0]).total for s, o in PREFERENCE[1:])
    return (
        f"Even micro-batch {micro_batches[0]} with everything offloaded needs {gigabytes(smallest)}: use GPUs with more memory, "
        "more GPUs, shorter or smaller samples, or a smaller model"
    )


def nearest_batches(global_batch: int, unit: int) -> tuple[int, int]:
    """The largest multiple of ``unit`` below the batch, if there is any, else the unit itself; and the smallest above."""
    below = global_batch // unit * unit
    return max(below, unit), below + unit


def batch_unit(world_size: int, ghost_batch_size: int | None, global_batch: int, is_even: bool = False) -> int:
    """What a planned batch is a multiple of where the one asked for does not divide.

    Each rank gets micro-batches of at least EFFICIENT_MICRO_BATCH if there is enough, or of the ghost batch size.
    """
    piece = ghost_batch_size or max(
        n for n in (1, 2, 4, EFFICIENT_MICRO_BATCH) if n == 1 or n * world_size <= global_batch
    )
    return world_size * (math.lcm(piece, 2) if is_even else piece)


def stage_table(
    demand: Demand, micro_batch: int, cluster: Cluster
) -> list[tuple[Layout, Memory, list[Traffic], float]]:
    """(layout, memory, traffic of a step, its seconds) of every stage and offload, for one micro-batch."""
    rows = []
    for option in PREFERENCE:
        layout = demand.layout(*option)
        step_traffic = demand.traffic(layout, micro_batch)
        seconds = communication_seconds(step_traffic, cluster)
        rows.append((layout, demand.memory(layout, micro_batch), step_traffic, seconds))
    return rows


def gigabytes(num_bytes: float) -> str:
    """E.g. "1.25 GB", "310 MB", "4 kB", in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def parse_bytes(text: str) -> int:
    """ "24GB", "24 GiB", "800MB" or a number of bytes.

    Raises:
        ValueError: anything else.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    stripped = text.strip().lower()
    digits = stripped.rstrip("bkmgi ")
    unit = stripped[len(digits) :].strip()
    try:
        value = float(digits) * units[unit]
    except (ValueError, KeyError):
        value = 0
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"the memory is {text!r}; expected a size such as 24GB, 80GiB or 800MB")
    return int(value)
