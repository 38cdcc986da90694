"""Writes checkpoints, whole or not at all. All functions are collectives."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from largebatch.engine.checkpoint.writing import Write, collected_errors, files_handed_to
from largebatch.launch.trainer.running_statistics import averaged_over_ranks, own_state
from largebatch.launch.trainer.saving import step_folders
from largebatch.launch.trainer.saving.retention import KEEP_ALL, Retention
from largebatch.launch.trainer.saving.storage import Storage, gathered, partial_id, storage_of


class CheckpointError(RuntimeError):
    """Why, and on which ranks."""


class CheckpointNotWrittenError(CheckpointError):
    """What was there before is untouched."""


class CheckpointNotRemovedError(CheckpointError):
    """The new checkpoint is complete; an old one is in the way.

    Attributes:
        checkpoint: path of the new one.
    """

    checkpoint: str


@dataclass(frozen=True)
class Attempt:
    """A checkpoint that is being written.

    Attributes:
        partial: the folder in which it is put together. final: the one whose name it gets.
        metrics: of the evaluation after the same step; empty without one.
    """

    folder: str
    step: int
    storage: Storage
    retention: Retention
    metrics: dict[str, float]

    @property
    def final(self) -> str:
        return os.path.join(self.folder, step_folders.name_of(self.step))

    @property
    def partial(self) -> str:
        return f"{self.final}.partial"


def save(
    engine: Any,
    folder: str,
    step: int,
    *,
    rank: int,
    retention: Retention = KEEP_ALL,
    metrics: dict[str, float] | None = None,
) -> str:
    """Writes ``folder/step<N>`` on all ranks; it appears, and ``latest`` names it, only once it is complete on the disk.

    Args:
        retention: which checkpoints are kept; the others are removed once this one is complete.
        metrics: of the evaluation after this step, kept with the checkpoint.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointNotWrittenError: on all ranks, if any could not write its part. Nothing is left of the attempt.
        CheckpointNotRemovedError: on all ranks, if it is complete, but an old one could not be removed.
    """
    write_file = engine.checkpoint_engine.save
    attempt = begin(folder, step, retention, metrics)
    errors: list[str] = []

    def write(state: Any, path: str) -> None:
        with collected_errors(errors):
            write_file(state, path)

    with abandoned_on_error(attempt):
        collect(engine, attempt, write, errors, rank=rank)
        complete(attempt, errors)
    return attempt.final


def begin(folder: str, step: int, retention: Retention, metrics: dict[str, float] | None) -> Attempt:
    """Makes the folder in which a checkpoint is put together."""
    errors: list[str] = []
    with collected_errors(errors):
        os.makedirs(folder, exist_ok=True)
    raise_together(step, errors)
    attempt = Attempt(folder, step, storage_of(os.path.abspath(folder)), retention, metrics or {})
    with collected_errors(errors):
        if attempt.storage.is_owner:
            step_folders.remove_unfinished(folder)
            os.makedirs(attempt.partial)
    raise_together(step, errors)
    return attempt


def collect(engine: Any, attempt: Attempt, write: Write, errors: list[str], *, rank: int) -> None:
    """Hands every file of a checkpoint to ``write``: DeepSpeed's, and this rank's running statistics.

    Args:
        errors: of the file system, as they come; alone, the rank would leave the others waiting. Written.
    """
    with averaged_over_ranks(engine.module), files_handed_to(engine, write, errors):
        engine.save_checkpoint(
            attempt.folder,
            tag=os.path.basename(attempt.partial),
            client_state={"largebatch_step": attempt.step},
            save_latest=False,
        )
    name, own = own_state(engine.module, rank)
    if own:
        write(own, os.path.join(attempt.partial, name))


def complete(attempt: Attempt, errors: list[str], group: dist.ProcessGroup | None = None) -> None:
    """Once all files are written: checksums, the manifest, the name, the pointers; then what need not be kept goes.

    Args:
        errors: of this rank so far.
        group: for the agreement of the ranks; None: the one that training uses.

    Raises:
        CheckpointNotWrittenError, CheckpointNotRemovedError: on all ranks.
    """
    step, storage, partial = attempt.step, attempt.storage, attempt.partial
    raise_together(step, errors, group)
    mine: dict[str, dict[str, Any]] = {}
    with collected_errors(errors):
        mine = step_folders.entries(
            partial, step_folders.share_of(step_folders.files_in(partial), storage.part, storage.num_parts)
        )
    raise_together(step, errors, group)
    everywhere = gathered((partial_id(storage), mine), group)
    with collected_errors(errors):
        if storage.is_owner:
            found = {k: v for owner, part in everywhere if owner == partial_id(storage) for k, v in part.items()}
            step_folders.write_manifest(
                partial, found, step=step, world_size=dist.get_world_size(), metrics=attempt.metrics
            )
            put_in_place(partial, attempt.final)
            step_folders.point_to(attempt.folder, step)
    raise_together(step, errors, group)
    with collected_errors(errors):
        if storage.is_owner:
            attempt.retention.apply(attempt.folder, step)
    said = said_by_ranks(errors, group)
    if said:
        error = CheckpointNotRemovedError(
            f"the checkpoint of step {step} is complete, but one that need not be kept could not be removed: {said}"
        )
        error.checkpoint = attempt.final
        raise error


def raise_together(step: int, errors: list[str], group: dist.ProcessGroup | None = None) -> None:
    """Raises CheckpointNotWrittenError on all ranks if any has errors."""
    said = said_by_ranks(errors, group)
    if said:
        raise CheckpointNotWrittenError(
            f"the checkpoint of step {step} could not be written: {said}. Make room, or choose a folder that can be written "
            "with --output; checkpoints written before are untouched"
        )


def said_by_ranks(errors: list[str], group: dist.ProcessGroup | None) -> str:
    """The first errors of all ranks, the same text on each; "" without."""
    everywhere = [f"rank {rank}: {error}" for rank, found in enumerate(gathered(errors, group)) for error in found]
    more = f" (and {len(everywhere) - 3} more)" if len(everywhere) > 3 else ""
    return "; ".join(everywhere[:3]) + more


@contextlib.contextmanager
def abandoned_on_error(attempt: Attempt) -> Iterator[None]:
    """Removes what there is of a checkpoint that could not be written."""
    try:
        yield
    except CheckpointNotWrittenError:
        if attempt.storage.is_owner:
            shutil.rmtree(attempt.partial, ignore_errors=True)
        raise


def put_in_place(partial: str, final: str) -> None:
    """A whole checkpoint of the same step stays as it is; a damaged one makes room."""
    if os.path.isdir(final) and not step_folders.faults(final):
        shutil.rmtree(partial)
        return
    damaged = f"{final}.damaged"
    if os.path.isdir(final):
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(final, damaged)
    step_folders.finish(partial, final)
    shutil.rmtree(damaged, ignore_errors=True)
