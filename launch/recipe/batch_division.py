"""How a global batch is divided among ranks: the micro-batches that it can be made of, and the one that is taken."""

from __future__ import annotations

import math
from typing import Any

from largebatch.models.batch_norm import MICRO_BATCH, pieces_for

LARGEST_AUTOMATIC_MICRO_BATCH = 256


def micro_batch_candidates(recipe: dict[str, Any], world_size: int) -> list[int]:
    """The micro-batches, ascending, with which a checked recipe can be trained on so many ranks.

    They divide a rank's share of the global batch, give batch normalisation the ghost batches that it asks for, and are even under
    mixup, which mixes neighbours.

    Raises:
        ValueError: there are none; names the nearest batches that have some.
    """
    section, global_batch = recipe["largebatch"], recipe["train_batch_size"]
    if global_batch % world_size:
        raise ValueError(
            f"train_batch_size is {global_batch} and there are {world_size} ranks; expected a multiple of {world_size}, "
            f"such as {nearest_multiples(global_batch, world_size)}"
        )
    share = global_batch // world_size
    candidates = [
        d
        for d in divisors(share)
        if can_have_ghost_batches(section, d, world_size) and not (section["mixup"] and d % 2)
    ]
    if not candidates:
        size, unit = section["batch_norm"].get("ghost_batch_size", MICRO_BATCH), world_size
        if isinstance(size, int):
            unit *= size
        if section["mixup"] and unit % (2 * world_size):
            unit *= 2
        raise ValueError(
            f"train_batch_size is {global_batch}, which {world_size} ranks cannot make with largebatch.batch_norm.ghost_batch_size {size!r}"
            f"{' and mixup, which needs even micro-batches' if section['mixup'] else ''}; nearest that they can: "
            f"{nearest_multiples(global_batch, unit)}"
        )
    return candidates


def divisors(value: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return sorted({*small, *(value // d for d in small)})


def is_micro_batch_open(recipe: dict[str, Any]) -> bool:
    return recipe.get("train_micro_batch_size_per_gpu", "auto") == "auto"


def can_have_ghost_batches(section: dict[str, Any], micro_batch: int, world_size: int) -> bool:
    size = section["batch_norm"].get("ghost_batch_size", MICRO_BATCH)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        pieces_for(size, micro_batch, world_size)
        return True
    return micro_batch % size == 0 or (size % micro_batch == 0 and world_size % (size // micro_batch) == 0)


def micro_batch_for(recipe: dict[str, Any], world_size: int) -> int:
    """The micro-batch of a checked recipe.

    For "auto" the ghost batch size, if that is a candidate up to 256: torch's own kernels take it. Else the
    largest candidate up to 256, or the smallest of all. On a GPU train.py has put the largest that fits in the place of
    "auto" by then (micro_batch.py).

    Raises:
        ValueError: the global batch cannot be made of it; names the nearest batches that can.
    """
    section, global_batch = recipe["largebatch"], recipe["train_batch_size"]
    micro = recipe.get("train_micro_batch_size_per_gpu", "auto")
    if micro == "auto":
        candidates = micro_batch_candidates(recipe, world_size)
        if (
            size := section["batch_norm"].get("ghost_batch_size")
        ) in candidates and size <= LARGEST_AUTOMATIC_MICRO_BATCH:
            return size
        return max((d for d in candidates if d <= LARGEST_AUTOMATIC_MICRO_BATCH), default=candidates[0])
    if not isinstance(micro, int) or isinstance(micro, bool) or micro < 1:
        raise ValueError(f'train_micro_batch_size_per_gpu is {micro!r}; expected an integer >= 1 or "auto"')
    if global_batch % (micro * world_size):
        raise ValueError(
            f"train_batch_size is {global_batch}, and {world_size} ranks with micro-batches of {micro} make multiples of "
            f"{micro * world_size}; nearest: {nearest_multiples(global_batch, micro * world_size)}. Change one of them, or "
            'set train_micro_batch_size_per_gpu to "auto"'
        )
    pieces_for(section["batch_norm"].get("ghost_batch_size", MICRO_BATCH), micro, world_size)
    if section["mixup"] and micro % 2:
        raise ValueError(
            f"train_micro_batch_size_per_gpu is {micro} and largebatch.mixup {section['mixup']}; expected an even number: each "
            "image is mixed with its neighbour in the data order"
        )
    return micro


def nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{below + unit}"
