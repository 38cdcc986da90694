"""Images read from files by worker processes, some micro-batches ahead of training."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from largebatch.launch.data.augmentation import Transform
from largebatch.launch.data.data_set import ImageFiles
from largebatch.launch.data.image_folder import UnreadableImageError, read_image
from largebatch.launch.data.sample_order import hashes

MOST_AUTOMATIC_WORKERS = 16
TRANSFORM_STREAM = 100


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        workers: processes; 0: the caller itself. prefetch: batches that each is ahead.
        is_replaced: whether another image takes the place of an unreadable one; else it is an error.
    """

    workers: int
    prefetch: int
    is_replaced: bool


def automatic_workers() -> int:
    """One for each core that this rank has, at most 16."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, min(MOST_AUTOMATIC_WORKERS, len(os.sched_getaffinity(0)) // local_ranks))


class Wanted(NamedTuple):
    """A sample to be read: its number in training (-1 in an evaluation), and which image it is."""

    sample: int
    index: int


class FileBatch(NamedTuple):
    """What the workers send.

    Attributes:
        pixels: [batch, 3, size, size] uint8, channels last. labels: [batch] int64.
        is_read: [batch] bool; where false, an evaluation's image could not be read, and its pixels are zero.
        unreadable: path -> reason.
        failure: why there is no batch (the tensors are empty then), or "".
    """

    pixels: Tensor
    labels: Tensor
    is_read: Tensor
    unreadable: dict[str, str]
    failure: str = ""


class FileSamples(Dataset):
    """Reads and transforms single images, in a worker."""

    def __init__(self, files: ImageFiles, transform: Transform, image_size: int, seed: int, *, is_replaced: bool):
        self.files, self.transform, self.seed, self.is_replaced = files, transform, seed, is_replaced
        self.nothing = torch.zeros(image_size, image_size, 3, dtype=torch.uint8)

    def __getitems__(self, wanted: list[Wanted]) -> FileBatch:
        unreadable: dict[str, str] = {}
        try:
            with torch.random.fork_rng(devices=[]):  # without workers, dropout draws from the same generator
                images, indices = zip(*(self._read(one, unreadable) for one in wanted), strict=True)
        except UnreadableImageError as error:  # raised by the trainer itself, without the traceback of a worker
            return FileBatch(*[torch.empty(0)] * 3, unreadable, str(error))
        pixels = torch.stack([self.nothing if image is None else image for image in images])
        is_read = torch.tensor([image is not None for image in images])
        return FileBatch(pixels.permute(0, 3, 1, 2), self.files.labels[list(indices)], is_read, unreadable)

    def _read(self, wanted: Wanted, unreadable: dict[str, str]) -> tuple[Tensor | None, int]:
        """The pixels [size, size, 3] uint8, and the index of the image that they come from."""
        index, is_evaluation = wanted.index, wanted.sample < 0
        for _ in range(len(self.files)):
            path = self.files.paths[index]
            try:
                image = read_image(path)
            except UnreadableImageError as error:
                if not self.is_replaced:
                    raise UnreadableImageError(
                        f"{path!r} cannot be read ({error}); replace the file, remove it, or set "
                        'largebatch.data_options.on_corrupt to "replace"'
                    ) from None
                unreadable[path] = str(error)
                if is_evaluation:
                    return None, index
                index = (index + 1) % len(self.files)
                continue
            if not is_evaluation:
                drawn = hashes(self.seed, np.array([wanted.sample]), TRANSFORM_STREAM)
                torch.default_generator.manual_seed(int(drawn[0] >> np.uint64(1)))
            return torch.from_numpy(np.array(self.transform(image))), index
        raise UnreadableImageError(
            f"none of the {len(self.files)} images beside {self.files.paths[0]!r} can be read, the first because of "
            f"{unreadable[self.files.paths[0]]}"
        )


def read_batches(
    files: ImageFiles,
    wanted: Iterable[list[Wanted]],
    transform: Transform,
    *,
    image_size: int,
    seed: int,
    reading: Reading,
    device: torch.device,
) -> Iterator[FileBatch]:
    """One batch for each list in ``wanted``, in that order; on the CPU, pinned if ``device`` is a GPU.

    Raises:
        UnreadableImageError: a file cannot be read and is not to be replaced, or none can.
    """
    loader = DataLoader(
        FileSamples(files, transform, image_size, seed, is_replaced=reading.is_replaced),
        batch_sampler=wanted,
        collate_fn=as_it_is,
        num_workers=reading.workers,
        prefetch_factor=reading.prefetch if reading.workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=prepare_worker,
    )
    for batch in loader:
        if batch.failure:
            raise UnreadableImageError(batch.failure)
        yield batch


def as_it_is(batch: FileBatch) -> FileBatch:
    return batch


def prepare_worker(worker: int) -> None:
    """One thread, and deaf to Ctrl-C: the trainer saves first, then ends its workers."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
