"""Checkpoints in DeepSpeed's format, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch.distributed as dist

LATEST = "latest"


def save(engine: Any, folder: str, step: int, *, local_rank: int) -> str:
    """Writes ``folder/step<N>`` on all ranks; it appears, and ``latest`` names it, only once it is complete.

    Returns:
        The checkpoint's path.
    """
    tag, partial = f"step{step}", f"step{step}.partial"
    engine.save_checkpoint(folder, tag=partial, client_state={"largebatch_step": step}, save_latest=False)
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


def load(engine: Any, folder: str) -> int:
    """Restores the newest complete checkpoint.

    Returns:
        The number of steps that it has seen.

    Raises:
        ValueError: there is none.
    """
    if not os.path.isfile(os.path.join(folder, LATEST)):
        raise ValueError(
            f"--resume: {folder!r} holds no complete checkpoint (no file {LATEST!r}); start without --resume"
        )
    path, client_state = engine.load_checkpoint(folder)
    if path is None or "largebatch_step" not in client_state:
        raise ValueError(f"--resume: the checkpoint in {folder!r} was not written by launch/train.py")
    return client_state["largebatch_step"]
