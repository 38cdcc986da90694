"""Writes checkpoints, whole or not at all. All functions are collectives."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from largebatch.launch.checkpoints import files
from largebatch.launch.checkpoints.storage import gathered, partial_id, storage_of
from largebatch.launch.running_statistics import averaged_over_ranks, save_own


class CheckpointNotWrittenError(RuntimeError):
    """Why, and on which ranks. What was there before is untouched."""


def raise_together(step: int, errors: list[str]) -> None:
    """Raises CheckpointNotWrittenError on all ranks if any has errors."""
    everywhere = [f"rank {rank}: {error}" for rank, found in enumerate(gathered(errors)) for error in found]
    if everywhere:
        more = f" (and {len(everywhere) - 3} more)" if len(everywhere) > 3 else ""
        raise CheckpointNotWrittenError(
            f"the checkpoint of step {step} could not be written: {'; '.join(everywhere[:3])}{more}. Make room, or choose a "
            "folder that can be written with --output; checkpoints written before are untouched"
        )


@contextlib.contextmanager
def collected_errors(errors: list[str]) -> Iterator[None]:
    """Keeps an error of the file system for later, when all ranks can speak of it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        errors.append(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def writes_collected(engine: Any, errors: list[str]) -> Iterator[None]:
    """Inside, a file that the engine cannot write is an error for later: alone, the rank would leave the others waiting."""
    writer = engine.checkpoint_engine
    write = writer.save

    def save(*args: Any, **kwargs: Any) -> Any:
        with collected_errors(errors):
            return write(*args, **kwargs)

    writer.save = save
    try:
        yield
    finally:
        del writer.save


def save(engine: Any, folder: str, step: int, *, rank: int) -> str:
    """Writes ``folder/step<N>`` on all ranks; it appears, and ``latest`` names it, only once it is complete on the disk.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointNotWrittenError: on all ranks, if any could not write its part. Nothing is left of the attempt.
    """
    final, partial = (os.path.join(folder, files.name_of(step) + suffix) for suffix in ("", ".partial"))
    errors: list[str] = []
    with collected_errors(errors):
        os.makedirs(folder, exist_ok=True)
    raise_together(step, errors)
    storage = storage_of(os.path.abspath(folder))
    with collected_errors(errors):
        if storage.is_owner:
            files.remove_unfinished(folder)
            os.makedirs(partial)
    raise_together(step, errors)
    try:
        with averaged_over_ranks(engine.module), writes_collected(engine, errors):
            engine.save_checkpoint(
                folder, tag=os.path.basename(partial), client_state={"largebatch_step": step}, save_latest=False
            )
        with collected_errors(errors):
            save_own(engine.module, partial, rank)
        raise_together(step, errors)
        mine: dict[str, dict[str, Any]] = {}
        with collected_errors(errors):
            mine = files.entries(partial, files.share_of(files.files_in(partial), storage.part, storage.num_parts))
        raise_together(step, errors)
        everywhere = gathered((partial_id(storage), mine))
        with collected_errors(errors):
            if storage.is_owner:
                found = {k: v for owner, part in everywhere if owner == partial_id(storage) for k, v in part.items()}
                files.write_manifest(partial, found, step=step, world_size=dist.get_world_size())
                put_in_place(partial, final)
                files.point_to(folder, step)
        raise_together(step, errors)
    except CheckpointNotWrittenError:
        if storage.is_owner:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def put_in_place(partial: str, final: str) -> None:
    """A whole checkpoint of the same step stays as it is; a damaged one makes room."""
    if os.path.isdir(final) and not files.faults(final):
        shutil.rmtree(partial)
        return
    damaged = f"{final}.damaged"
    if os.path.isdir(final):
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(final, damaged)
    files.finish(partial, final)
    shutil.rmtree(damaged, ignore_errors=True)
