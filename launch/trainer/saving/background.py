"""Checkpoints that are written while training goes on.

The training thread copies a checkpoint's files to host memory; a thread beside it writes them, waits for the disk, takes the
checksums and gives the checkpoint its name. The ranks agree in a gloo group of their own, so that this never mixes with
training's collectives. One checkpoint is under way at a time.

DeepSpeed's DecoupledCheckpointEngine writes in a process beside, but training waits for it before the next step, a failed
write is not told to the other ranks, and it names a checkpoint before the files have reached the disk.
torch.distributed.checkpoint.async_save has a format of its own, which DeepSpeed's tools cannot read; its stager, which keeps
shared storages shared and copies from GPUs through pinned memory, is used here.
"""

from __future__ import annotations

import datetime
import threading
from typing import Any

import torch
import torch.distributed as dist

from largebatch.engine.checkpoint.writing import collected_errors
from largebatch.launch.trainer.saving import atomic
from largebatch.launch.trainer.saving.retention import KEEP_ALL, Retention

SECONDS_TO_AGREE = 24 * 3600
"""How long a rank waits for the slowest one's disk. A rank that is gone is noticed at once, by training if not here."""


def new_stager() -> Any:
    """Copies a state to host memory in the calling thread.

    Raises:
        ValueError: this torch has none.
    """
    try:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    except ImportError:
        raise ValueError(
            f"largebatch.save_in_background is true, and torch {torch.__version__} has nothing that copies checkpoints for that; set "
            "it to false, or install torch >= 2.11"
        ) from None
    has_gpu = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=has_gpu,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=has_gpu,
        )
    )


class BackgroundSaving:
    """Writes checkpoints of one engine beside its training. All methods are collectives but is_done.

    It costs each rank the size of its part of a checkpoint in host memory, from the first checkpoint to the end of the run.
    """

    def __init__(self, engine: Any, *, rank: int):
        self.engine, self.rank = engine, rank
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=SECONDS_TO_AGREE))
        self.stager = new_stager()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(
        self,
        folder: str,
        step: int,
        *,
        retention: Retention = KEEP_ALL,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Copies the state to host memory and begins to write it as ``atomic.save`` would. Call ``finish`` before.

        Raises:
            CheckpointNotWrittenError: on all ranks, if the copy or its folder cannot be made.
        """
        assert self.thread is None, "one checkpoint at a time"
        write_file = self.engine.checkpoint_engine.save
        attempt = atomic.begin(folder, step, retention, metrics)
        errors: list[str] = []
        copies: list[tuple[Any, str]] = []

        def copy(state: Any, path: str) -> None:
            with collected_errors(errors):
                copies.append((self.stager.stage(state), path))

        with atomic.abandoned_on_error(attempt):
            atomic.collect(self.engine, attempt, copy, errors, rank=self.rank)
            atomic.raise_together(step, errors)

        def write() -> None:
            try:
                with atomic.abandoned_on_error(attempt):
                    for state, path in copies:
                        with collected_errors(errors):
                            write_file(state, path)
                    copies.clear()
                    atomic.complete(attempt, errors, self.group)
            except BaseException as error:  # raised again where training can see it
                self.error = error

        # a rank that dies of another cause must not wait for the disk
        self.thread = threading.Thread(target=write, name=f"checkpoint of step {step}", daemon=True)
        self.thread.start()

    @property
    def is_done(self) -> bool:
        """Whether ``finish`` would return at once. Ranks may see it at different moments."""
        return self.thread is not None and not self.thread.is_alive()

    def finish(self) -> None:
        """Waits until the checkpoint under way is complete, if there is one.

        Raises:
            CheckpointNotWrittenError: on all ranks, if it could not be written.
        """
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Gives the host memory back. Call ``finish`` before."""
        assert self.thread is None, "a checkpoint is under way"
        self.stager.close()
