"""Micro-batches of images: to train on, endlessly and augmented, and to evaluate on, each image once."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from largebatch.launch.data.augmentation import davidnet, image_transform, mixup_weights
from largebatch.launch.data.data_set import DataSet, ImageBatch, ImageFiles, Source
from largebatch.launch.data.file_loading import FileBatch, Reading, Wanted, read_batches
from largebatch.launch.data.sample_order import SampleOrder, micro_batch_ranges
from largebatch.launch.data.transfers import uploaded

CHUNK = 64
"""Images that a worker reads at a time: what is read ahead does not grow with the micro-batch."""


@dataclass
class ImageLoader:
    """A data set of images in batches.

    Attributes:
        augmentation: "none", "minimal", "inception", "maximal" or "davidnet"; mixup: alpha, 0 for none.
        resize_size: of the shorter side of images from files; reading: how they are read.
        unreadable: path -> reason, of the files that this rank could not read so far.
    """

    data: DataSet
    augmentation: str = "none"
    mixup: float = 0.0
    resize_size: int = 0
    reading: Reading = Reading(workers=0, prefetch=2, is_replaced=True)
    unreadable: dict[str, str] = field(default_factory=dict)
    _resident: dict[int, Source] = field(default_factory=dict)

    def micro_batches(self, *, seed: int, device: torch.device, **layout: int) -> Iterator[ImageBatch]:
        """Those of one rank, endlessly; on ``device``.

        Images in memory are kept on the device (uint8), so that nothing is copied while training.

        Args:
            layout: of the global batch, as micro_batch_ranges takes it.
        """
        order = SampleOrder(len(self.data.train), seed)
        ranges = micro_batch_ranges(**layout)
        if isinstance(self.data.train, ImageFiles):
            yield from self._from_files(order, ranges, seed, device)
            return
        train = self._on(device, self.data.train)
        for numbers in ranges:
            pixels, labels = train.batch(order.indices(numbers.start, numbers.stop))
            samples = np.arange(numbers.start, numbers.stop)
            if self.augmentation == "davidnet":
                pixels = davidnet(pixels, mean=self.data.mean, seed=seed, samples=samples)
            yield ImageBatch(pixels, labels, self._mixup_weights(seed, samples, device))

    def _mixup_weights(self, seed: int, samples: np.ndarray, device: torch.device) -> Tensor | None:
        return uploaded(mixup_weights(self.mixup, seed=seed, samples=samples), device) if self.mixup else None

    def _from_files(
        self, order: SampleOrder, ranges: Iterator[range], seed: int, device: torch.device
    ) -> Iterator[ImageBatch]:
        asked: list[range] = []

        def wanted() -> Iterator[list[Wanted]]:
            for numbers in ranges:
                asked.append(numbers)
                indices = order.indices(numbers.start, numbers.stop).tolist()
                samples = list(map(Wanted, numbers, indices))
                yield from (samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK))

        chunks = self._read(self.data.train, wanted(), self.augmentation, seed, device)
        for first in chunks:
            numbers = asked.pop(0)
            pieces = [first, *itertools.islice(chunks, -(-len(numbers) // CHUNK) - 1)]
            pixels, labels = (
                torch.cat([uploaded(getattr(piece, name), device) for piece in pieces]) for name in ("pixels", "labels")
            )
            yield ImageBatch(pixels, labels, self._mixup_weights(seed, np.arange(numbers.start, numbers.stop), device))

    def test_batches(
        self, *, batch_size: int, rank: int, world_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(pixels, labels, [batch] bool which of them count); every rank gets as many batches.

        Rank r takes images r, r + world_size, ...; the batches are filled up with images that do not count, because under
        ZeRO stage 3 a forward pass is a collective.
        """
        test = self.data.test
        batches = evaluation_indices(len(test), batch_size=batch_size, rank=rank, world_size=world_size)
        if isinstance(test, ImageFiles):
            batches = list(batches)
            wanted = ([Wanted(-1, index) for index in indices.tolist()] for indices, _ in batches)
            for batch, (_, counts) in zip(self._read(test, wanted, "none", 0, device), batches, strict=True):
                yield tuple(uploaded(t, device) for t in (batch.pixels, batch.labels, batch.is_read & counts))
            return
        test = self._on(device, test)
        for indices, counts in batches:
            yield *test.batch(indices), uploaded(counts, device)

    def _read(
        self, files: ImageFiles, wanted: Iterator[list[Wanted]], augmentation: str, seed: int, device: torch.device
    ) -> Iterator[FileBatch]:
        size = self.data.image_shape[1]
        transform = image_transform(augmentation, image_size=size, resize_size=self.resize_size)
        for batch in read_batches(
            files, wanted, transform, image_size=size, seed=seed, reading=self.reading, device=device
        ):
            for path, reason in batch.unreadable.items():
                self._note(path, reason, files)
            yield batch

    def _note(self, path: str, reason: str, files: ImageFiles) -> None:
        if path not in self.unreadable:
            self.unreadable[path] = reason
            what = (
                "left out of the evaluation" if files is self.data.test else "replaced by the next image in the folder"
            )
            tqdm.write(f"largebatch: {path!r} cannot be read ({reason}); it is {what}", file=sys.stderr)

    def _on(self, device: torch.device, source: Source) -> Source:
        """The source on the device, copied there once."""
        if id(source) not in self._resident:
            self._resident[id(source)] = source.to(device)
        return self._resident[id(source)]


def evaluation_indices(
    num_samples: int, *, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """([batch] int64 indices, [batch] bool which of them count) of one rank."""
    per_rank = -(-num_samples // world_size)
    for start in range(0, per_rank, batch_size):
        numbers = rank + world_size * torch.arange(start, min(start + batch_size, per_rank))
        yield numbers.clamp(max=num_samples - 1), numbers < num_samples
