"""Where the layers lie in a flat partition. Integers only: no tensors, no process groups, no mathematics.

A sharded optimizer concatenates the layers of a group, pads the result, and gives each rank one slice (ZeRO 1 and
2), or cuts every layer by itself and concatenates each rank's cuts (ZeRO 3). Either way a rank's partition is a row of
segments with padding between and behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """The intersection of one layer with one partition; never empty.

    Attributes:
        layer: number of the layer within its group, the same on every rank.
        start, stop: half-open interval in the partition, in elements.
        layer_start: offset of the first element in the flattened layer.
    """

    layer: int
    start: int
    stop: int
    layer_start: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class LayerMap:
    """What one rank owns of a group of layers.

    Attributes:
        layer_numels: [num_layers] elements of each whole layer, the same on every rank.
        partition_numel: elements of this rank's flat tensor, padding included.
        segments: ascending and disjoint; whatever they leave out is padding.
    """

    layer_numels: tuple[int, ...]
    partition_numel: int
    segments: tuple[Segment, ...]

    def __post_init__(self):
        position = 0
        for segment in self.segments:
            assert position <= segment.start < segment.stop <= self.partition_numel, (segment, self.partition_numel)
            assert 0 <= segment.layer_start
            assert segment.layer_start + segment.numel <= self.layer_numels[segment.layer], segment
            position = segment.stop

    @property
    def num_layers(self) -> int:
        return len(self.layer_numels)


def whole_layer(numel: int) -> LayerMap:
    """The map of one layer that is not cut."""
    return LayerMap((numel,), numel, (Segment(0, 0, numel, 0),) if numel else ())


def slice_of_concatenation(
    layer_numels: Sequence[int], layer_offsets: Sequence[int], partition_numel: int, partition_rank: int
) -> LayerMap:
    """ZeRO 1 and 2: rank r owns elements [r n, (r + 1) n) of the concatenated layers, n the partition's size.

    Args:
        layer_numels: elements of each layer, in the order of the concatenation.
        layer_offsets: where each layer starts in the concatenation; gaps between layers are padding.
    """
    begin = partition_rank * partition_numel
    end = begin + partition_numel
    segments = []
    for layer, (numel, offset) in enumerate(zip(layer_numels, layer_offsets, strict=True)):
        first, last = max(offset, begin), min(offset + numel, end)
        if first < last:
            segments.append(Segment(layer, first - begin, last - begin, first - offset))
    return LayerMap(tuple(layer_numels), partition_numel, tuple(segments))


def concatenation_of_slices(
    layer_numels: Sequence[int], slice_numels: Sequence[int], partition_numel: int, partition_rank: int
) -> LayerMap:
    """ZeRO 3: rank r owns elements [r s, (r + 1) s) of each layer, s the layer's slice size, laid one after another.

    Args:
        layer_numels: elements of each layer.
        slice_numels: elements that each rank reserves for the layer; what exceeds the layer is padding.
    """
    segments, position = [], 0
    for layer, (numel, slice_numel) in enumerate(zip(layer_numels, slice_numels, strict=True)):
        layer_start = partition_rank * slice_numel
        owned = min(slice_numel, max(0, numel - layer_start))
        if owned:
            segments.append(Segment(layer, position, position + owned, layer_start))
        position += slice_numel
    return LayerMap(tuple(layer_numels), partition_numel, tuple(segments))


@dataclass(frozen=True)
class Cut:
    """How a row of layers is cut into partitions, one for each rank: the same on every rank.

    Attributes:
        layer_numels: [num_layers] elements of each layer.
        partition_numel: elements of every rank's partition, padding included.
        layer_offsets: [num_layers] of a slice of the concatenation (ZeRO 1 and 2); None for ZeRO 3.
        slice_numels: [num_layers] of a concatenation of slices (ZeRO 3); None for ZeRO 1 and 2.
    """

    layer_numels: tuple[int, ...]
    partition_numel: int
    layer_offsets: tuple[int, ...] | None = None
    slice_numels: tuple[int, ...] | None = None

    def layer_map(self, rank: int) -> LayerMap:
        """What a rank owns."""
        if self.layer_offsets is not None:
            return slice_of_concatenation(self.layer_numels, self.layer_offsets, self.partition_numel, rank)
        assert self.slice_numels is not None
        return concatenation_of_slices(self.layer_numels, self.slice_numels, self.partition_numel, rank)


def uncut(numel: int) -> Cut:
    """Of one layer that its rank holds whole."""
    return Cut((numel,), numel, layer_offsets=(0,))
