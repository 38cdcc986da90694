"""Finds the newest whole checkpoint and restores it. All functions are collectives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from largebatch.engine.checkpoint.agreement import gathered
from largebatch.engine.config_checks.arguments import is_raised_by
from largebatch.launch.supervise.exits import is_lost_rank
from largebatch.launch.trainer.running_statistics import load_own
from largebatch.launch.trainer.saving import step_folders
from largebatch.launch.trainer.saving.storage import storage_of


def has_any(folder: str) -> bool:
    """Whether any rank sees a checkpoint, whole or not."""
    return any(gathered(bool(step_folders.steps_in(folder))))


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
    steps = sorted({step for of_rank in gathered(step_folders.steps_in(folder)) for step in of_rank}, reverse=True)
    damages = []
    for step in steps:
        wrong = step_folders.faults(os.path.join(folder, step_folders.name_of(step)), storage.part, storage.num_parts)
        everywhere = list(dict.fromkeys(fault for of_rank in gathered(wrong) for fault in of_rank))
        if not everywhere:
            return step, damages
        more = f" and {len(everywhere) - 2} more" if len(everywhere) > 2 else ""
        damages.append(f"{step_folders.name_of(step)}: {'; '.join(everywhere[:2])}{more}")
    raise ValueError(
        f"--resume: no checkpoint in {folder!r} is whole: {'; '.join(damages)}. Start without --resume, with another --output"
    )


def load(engine: Any, folder: str, step: int, *, rank: int) -> None:
    """Restores a checkpoint that newest_whole has named: weights, optimizer, schedule, loss scale. At any layout.

    Raises:
        ValueError: it was written by another program, or it is of another model or optimizer.
    """
    with read_errors(folder, step):
        path, client_state = engine.load_checkpoint(folder, tag=step_folders.name_of(step))
    if path is None or client_state.get("largebatch_step") != step:
        raise ValueError(f"--resume: the checkpoint in {folder!r} was not written by launch/train.py")
    load_own(engine.module, os.path.join(folder, step_folders.name_of(step)), rank)


@contextlib.contextmanager
def read_errors(folder: str, step: int) -> Iterator[None]:
    """Says in one line which checkpoint cannot be taken, whatever torch or DeepSpeed found wrong with it."""
    try:
        yield
    except Exception as error:
        if is_lost_rank(error) or is_raised_by(error, ("largebatch",)):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--resume: the checkpoint {os.path.join(folder, step_folders.name_of(step))!r} cannot be taken into this model and optimizer: "
            f"{type(error).__name__}: {reason[:400]}{'...' if len(reason) > 400 else ''}. Resume with the recipe and the settings "
            "with which it was written"
        ) from error


def load_for_next_phase(engine: Any, folder: str, step: int, *, rank: int) -> None:
    """Weights and optimizer state of a checkpoint; hyperparameters and schedule stay those of this phase."""
    optimizer = engine.basic_optimizer
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    engine.load_checkpoint(folder, tag=step_folders.name_of(step), load_lr_scheduler_states=False)
    for group, values in zip(engine.basic_optimizer.param_groups, own, strict=True):
        group.update(values)
    load_own(engine.module, os.path.join(folder, step_folders.name_of(step)), rank)


WHAT_STAYS = (("train_batch_size",), ("largebatch", "data"), ("largebatch", "data_options"), ("largebatch", "seed"))
"""Entries of the filled-in config on which the position in the data depends."""


def check_same_data(earlier: dict[str, Any] | None, config: dict[str, Any]) -> None:
    """The number of ranks, the micro-batch, precision and ZeRO stage may change between a run and its resumption; these not.

    Args:
        earlier, config: filled-in configs of a phase: of the run that is to be resumed (None if not known), and now.

    Raises:
        ValueError: naming the entry and both values.
    """
    for path in WHAT_STAYS if earlier is not None else ():
        before, now = earlier, config
        for key in path:
            before, now = before.get(key), now.get(key)  # type: ignore[union-attr]
        if before != now:
            name = ".".join(path)
            raise ValueError(
                f"--resume: {name} is {now!r} and was {before!r} in the run that is to be continued; the place in the data that "
                f"training has reached would be another. Set it to {before!r}, or begin a run in another --output"
            )
