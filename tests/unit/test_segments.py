"""Layer maps as integers: whatever the layout, every element of every layer is covered once, padding never."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.layer_map.segment import concatenation_of_slices, slice_of_concatenation, whole_layer

layer_sizes = st.lists(st.integers(0, 200), min_size=0, max_size=12)
world_sizes = st.integers(1, 64)


def assert_each_element_once(numels, maps):
    covered = [[0] * n for n in numels]
    for layer_map in maps:
        assert layer_map.layer_numels == tuple(numels)
        for segment in layer_map.segments:
            assert segment.numel > 0
            for offset in range(segment.numel):
                covered[segment.layer][segment.layer_start + offset] += 1
    assert all(count == 1 for layer in covered for count in layer)


@settings(max_examples=300, deadline=None)
@given(
    numels=layer_sizes,
    world=world_sizes,
    gaps=st.lists(st.integers(0, 9), min_size=12, max_size=12),
    tail=st.integers(0, 50),
)
def test_slices_of_a_concatenation(numels, world, gaps, tail):
    """ZeRO 1 and 2, with padding between layers and behind them."""
    offsets, position = [], 0
    for numel, gap in zip(numels, gaps, strict=False):
        offsets.append(position)
        position += numel + gap
    partition = -(-(position + tail) // world)
    maps = [slice_of_concatenation(numels, offsets, partition, rank) for rank in range(world)]
    assert_each_element_once(numels, maps)
    for rank, layer_map in enumerate(maps):
        for s in layer_map.segments:  # the place in the concatenation is the same from both sides
            assert rank * partition + s.start == offsets[s.layer] + s.layer_start


@settings(max_examples=300, deadline=None)
@given(numels=layer_sizes, world=world_sizes)
def test_concatenations_of_slices(numels, world):
    """ZeRO 3: every layer cut by itself; layers smaller than the world leave ranks without a piece."""
    slices = [-(-numel // world) for numel in numels]
    maps = [concatenation_of_slices(numels, slices, sum(slices), rank) for rank in range(world)]
    assert_each_element_once(numels, maps)
    for rank, layer_map in enumerate(maps):
        starts = list(itertools.accumulate(slices, initial=0))
        for s in layer_map.segments:
            assert s.start == starts[s.layer] and s.layer_start == rank * slices[s.layer]


def test_examples():
    # 3 + 5 elements on 2 ranks of 5: rank 0 has all of layer 0 and two of layer 1, rank 1 three and two of padding
    first, second = (slice_of_concatenation([3, 5], [0, 3], 5, rank) for rank in (0, 1))
    assert [(s.layer, s.start, s.stop, s.layer_start) for s in first.segments] == [(0, 0, 3, 0), (1, 3, 5, 0)]
    assert [(s.layer, s.start, s.stop, s.layer_start) for s in second.segments] == [(1, 0, 3, 2)]
    # a rank that owns nothing; a layer over three ranks
    assert slice_of_concatenation([2], [0], 2, 1).segments == ()
    pieces = [slice_of_concatenation([7], [0], 3, rank).segments for rank in range(3)]
    assert [p[0].numel for p in pieces] == [3, 3, 1]
    assert whole_layer(0).segments == () and whole_layer(4).segments[0].numel == 4
