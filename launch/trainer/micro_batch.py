"""The largest micro-batch that fits into the memory of the device, when a recipe leaves it open.

The ranks try sizes on engines that are thrown away afterwards, with the model, the optimizer and the data of the run: two
micro-steps and an optimizer step, with collectives that send nothing, so that a rank that runs out of memory keeps no other
waiting. After each try they agree whether it went well on all. The training engine is built anew: nothing of a failed try, partial
gradients least of all, is in it, and the global batch, the order of the data and the weights are what they would have been.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from largebatch.engine.silent_collectives import silent_collectives

SHARE_OF_MEMORY = 0.95
"""What tries may take of a GPU; the rest is for fragmentation and the libraries' own allocations."""

OUT_OF_MEMORY_MESSAGES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Of RuntimeErrors that mean the same as torch.OutOfMemoryError."""

FAILED = -1
"""In place of an answer, 0 or 1."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)


def largest_that_fits(candidates: Sequence[int], fits: Callable[[int], bool], *, world_size: int) -> int:
    """The largest candidate that fits.

    Args:
        candidates: ascending; if one fits, all smaller ones do.
        fits: whether a micro-batch fits on all ranks; the same on each of them.

    Raises:
        ValueError: not even the smallest fits.
    """
    below, above = -1, len(candidates)  # the largest that fits lies in [below, above)
    while above - below > 1:
        middle = max(0, (below + above) // 2)
        if fits(candidates[middle]):
            below = middle
        else:
            above = middle
    if below < 0:
        raise ValueError(
            f"out of memory with the smallest possible micro-batch, {candidates[0]}, on at least one of {world_size} ranks; "
            "expected a model that fits. Use a higher zero_optimization.stage, offload_optimizer, bf16, or more GPUs"
        )
    return candidates[below]


def on_all_ranks(is_so: Callable[[], bool], device: torch.device) -> bool:
    """Whether a function that communicates with nobody returns True on every rank. A collective.

    Raises:
        Exception: what it has raised on this rank; a RuntimeError on the others, which would wait for it.
    """
    failure: Exception | None = None
    try:
        answer = int(is_so())
    except Exception as error:
        answer, failure = FAILED, error
    agreed = torch.tensor(answer, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    if failure is not None:
        raise failure
    if agreed.item() == FAILED:
        raise RuntimeError("another rank has failed while it tried a micro-batch; its own message says why")
    return bool(agreed.item())


class Trial:
    """Tries micro-batches, the same ones on all ranks.

    Args:
        build_engine: the engine of the run, for the smallest micro-batch. A collective.
        batch_of: micro-batch -> a batch of this rank's data.
        loss: engine, batch -> loss.
        set_micro_batch: engine, micro-batch -> None; tells the model, as batch normalisation needs.
    """

    def __init__(
        self,
        build_engine: Callable[[], Any],
        batch_of: Callable[[int], Any],
        loss: Callable[[Any, Any], torch.Tensor],
        set_micro_batch: Callable[[Any, int], None],
        device: torch.device,
    ):
        self.build_engine, self.batch_of, self.loss = build_engine, batch_of, loss
        self.set_micro_batch, self.device = set_micro_batch, device
        self.engine: Any = build_engine()

    def fits(self, micro_batch: int) -> bool:
        """Whether all ranks can take two micro-steps and a step. A collective; only a lack of memory means that one cannot.

        After a failure all ranks build their engines anew: DeepSpeed numbers process groups, modules and parameters in the
        order in which they are made, and compares these numbers between ranks.
        """
        if self.engine is None:
            self.engine = self.build_engine()
        is_fitting = on_all_ranks(lambda: self._fits_here(micro_batch), self.device)
        if not is_fitting:
            self.release()
        return is_fitting

    def _fits_here(self, micro_batch: int) -> bool:
        try:
            with silent_collectives(), memory_limited(self.device):
                self._step(micro_batch)
            return True
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        self.release()  # outside the handler, whose traceback holds on to the activations
        return False

    def _step(self, micro_batch: int) -> None:
        self.set_micro_batch(self.engine, micro_batch)
        batch = self.batch_of(micro_batch)
        self.engine.train()
        for is_last in (False, True):
            self.engine.set_gradient_accumulation_boundary(is_last)
            self.engine.backward(self.loss(self.engine, batch))
            self.engine.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Gives all memory back."""
        if self.engine is not None:
            self.engine.destroy()
        self.engine = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def memory_limited(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(SHARE_OF_MEMORY, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
