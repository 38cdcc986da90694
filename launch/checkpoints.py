"""Checkpoints in DeepSpeed's format, written whole or not at all, and read only if whole. All functions are collectives."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from largebatch.launch import checkpoint_files as files
from largebatch.launch.running_statistics import averaged_over_ranks, load_own, save_own


class CheckpointNotWrittenError(RuntimeError):
    """Why, and on which ranks. What was there before is untouched."""


@dataclass(frozen=True)
class Storage:
    """Which ranks see the same folder, and what each does for it.

    Attributes:
        part, num_parts: this rank's share of the checksums, among the ranks that see the folder.
        is_owner: of these ranks, the one that renames and removes.
    """

    part: int
    num_parts: int
    is_owner: bool


@functools.cache
def storage_of(folder: str) -> Storage:
    """One folder for all ranks, or one for each node."""
    os.makedirs(folder, exist_ok=True)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    name = broadcast(f".seen-{uuid.uuid4().hex}")
    token = os.path.join(folder, name)
    if rank == 0:
        open(token, "w").close()
    dist.barrier()
    is_shared = all(gathered(os.path.exists(token)))
    dist.barrier()
    if rank == 0:
        os.remove(token)
    if is_shared:
        return Storage(rank, world_size, rank == 0)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1))
    return Storage(local_rank, local_size, local_rank == 0)


def gathered(value: Any) -> list[Any]:
    """[world_size] the values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


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


def partial_id(storage: Storage) -> int:
    """The same number for ranks that share a folder, another for others."""
    return 0 if storage.num_parts == dist.get_world_size() else dist.get_rank() // storage.num_parts


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


def newest_whole(folder: str) -> tuple[int, list[str]]:
    """(step of the newest checkpoint that is whole on every rank, what is wrong with the newer ones).

    Every file is read and compared with its checksum, each rank a part of them.

    Raises:
        ValueError: there is none; says what was found.
    """
    if not any(gathered(bool(files.steps_in(folder)))):
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
