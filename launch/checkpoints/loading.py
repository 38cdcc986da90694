"""Finds the newest whole checkpoint and restores it. All functions are collectives."""

from __future__ import annotations

import os
from typing import Any

from largebatch.launch.checkpoints import files
from largebatch.launch.checkpoints.storage import gathered, storage_of
from largebatch.launch.running_statistics import load_own


def has_any(folder: str) -> bool:
    """Whether any rank sees a checkpoint, whole or not."""
    return any(gathered(bool(files.steps_in(folder))))


def newest_whole(folder: str) -> tuple[int, list[str]]:
    """(step of the newest checkpoint that is whole on every rank, what is wrong with the newer ones).

    Every file is read and compared with its checksum, each rank a part of them.

    Raises:
        ValueError: there is none; says what was found.
    """
    if not has_any(folder):
        raise ValueError(
            f"--resume: {folder!r} holds no complete checkpoint (no folder step<N>); start without --resume"
        )
    storage = storage_of(os.path.abspath(folder))
    steps = sorted({step for of_rank in gathered(files.steps_in(folder)) for step in of_rank}, reverse=True)
    damages = []
    for step in steps:
        wrong = files.faults(os.path.join(folder, files.name_of(step)), storage.part, storage.num_parts)
        everywhere = list(dict.fromkeys(fault for of_rank in gathered(wrong) for fault in of_rank))
        if not everywhere:
            return step, damages
        more = f" and {len(everywhere) - 2} more" if len(everywhere) > 2 else ""
        damages.append(f"{files.name_of(step)}: {'; '.join(everywhere[:2])}{more}")
    raise ValueError(
        f"--resume: no checkpoint in {folder!r} is whole: {'; '.join(damages)}. Start without --resume, with another --output"
    )


def load(engine: Any, folder: str, step: int, *, rank: int) -> None:
    """Restores a checkpoint that newest_whole has named: weights, optimizer, schedule, loss scale.

    Raises:
        ValueError: it was written by another program.
    """
    path, client_state = engine.load_checkpoint(folder, tag=files.name_of(step))
    if path is None or client_state.get("largebatch_step") != step:
        raise ValueError(f"--resume: the checkpoint in {folder!r} was not written by launch/train.py")
    load_own(engine.module, os.path.join(folder, files.name_of(step)), rank)


def load_for_next_stage(engine: Any, folder: str, step: int, *, rank: int) -> None:
    """Weights and optimizer state of a checkpoint; hyperparameters and schedule stay those of this stage."""
    optimizer = engine.basic_optimizer
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    engine.load_checkpoint(folder, tag=files.name_of(step), load_lr_scheduler_states=False)
    for group, values in zip(engine.basic_optimizer.param_groups, own, strict=True):
        group.update(values)
    load_own(engine.module, os.path.join(folder, files.name_of(step)), rank)
