"""Checkpoints in DeepSpeed's format, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch.distributed as dist

from largebatch.launch.running_statistics import averaged_over_ranks, load_own, save_own

LATEST = "latest"


def save(engine: Any, folder: str, step: int, *, rank: int, local_rank: int) -> str:
    """Writes ``folder/step<N>`` on all ranks; it appears, and ``latest`` names it, only once it is complete.

    Returns:
        The checkpoint's path.
    """
    tag, partial = f"step{step}", f"step{step}.partial"
    with averaged_over_ranks(engine.module):
        engine.save_checkpoint(folder, tag=partial, client_state={"largebatch_step": step}, save_latest=False)
    save_own(engine.module, os.path.join(folder, partial), rank)
    dist.barrier()
    if local_rank == 0:  # of every node: folders need not be shared
        final = os.path.join(folder, tag)
        if os.path.isdir(final):  # whole already, and of the same step: never taken away to be written anew
            shutil.rmtree(os.path.join(folder, partial))
        else:
            for name in os.listdir(os.path.join(folder, partial)):
                sync(os.path.join(folder, partial, name))
            os.rename(os.path.join(folder, partial), final)
        sync(folder)
        temporary = os.path.join(folder, f"{LATEST}.partial")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(tag)
        sync(temporary)
        os.replace(temporary, os.path.join(folder, LATEST))
        sync(folder)
    dist.barrier()
    return os.path.join(folder, tag)


def sync(path: str) -> None:
    """Waits until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest_step(folder: str) -> int:
    """Steps that the newest complete checkpoint has seen.

    Raises:
        ValueError: there is none.
    """
    if not os.path.isfile(os.path.join(folder, LATEST)):
        raise ValueError(
            f"--resume: {folder!r} holds no complete checkpoint (no file {LATEST!r}); start without --resume"
        )
    with open(os.path.join(folder, LATEST), encoding="utf-8") as file:
        tag = file.read().strip()
    if not tag.removeprefix("step").isdigit():
        raise ValueError(f"--resume: the checkpoint in {folder!r} was not written by launch/train.py")
    return int(tag.removeprefix("step"))


def load(engine: Any, folder: str, rank: int) -> int:
    """Restores the newest complete checkpoint.

    Returns:
        The number of steps that it has seen.

    Raises:
        ValueError: there is none.
    """
    step = latest_step(folder)
    path, client_state = engine.load_checkpoint(folder)
    if path is None or client_state.get("largebatch_step") != step:
        raise ValueError(f"--resume: the checkpoint in {folder!r} was not written by launch/train.py")
    load_own(engine.module, os.path.join(folder, f"step{step}"), rank)
    return step


def load_for_next_stage(engine: Any, folder: str, rank: int) -> None:
    """Weights and optimizer state of the newest checkpoint; hyperparameters and schedule stay those of this stage."""
    optimizer = engine.basic_optimizer
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    engine.load_checkpoint(folder, load_lr_scheduler_states=False)
    for group, values in zip(engine.basic_optimizer.param_groups, own, strict=True):
        group.update(values)
    load_own(engine.module, os.path.join(folder, f"step{latest_step(folder)}"), rank)
