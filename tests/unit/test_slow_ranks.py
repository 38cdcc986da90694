"""Which rank is named as slow, and when none is."""

from hypothesis import given
from hypothesis import strategies as st

from largebatch.launch.trainer.slow_ranks import (
    SECONDS_BETWEEN_LOOKS,
    SHARE_OF_STEP,
    SLOWER,
    SlowRanks,
    line_on_slowest,
)


def test_the_slow_one_is_named_with_how_much():
    line = line_on_slowest([2.0, 2.2, 8.7, 2.1], total=20.0, num_steps=10)
    assert line == (
        "warning: rank 2 is slow: reading and computing take it 0.870 s a step, 4.1 times the others' median of 0.210 s; they "
        "wait for it in 33% of the last 20 s"
    )


def test_nobody_is_named_for_what_does_not_matter():
    assert line_on_slowest([5.0], 20.0, 10) == "", "alone"
    assert line_on_slowest([5.0, 5.2], 20.0, 10) == "", "about the same"
    assert line_on_slowest([0.1, 0.9], 20.0, 10) == "", "nine times as long, but the step is spent elsewhere"
    assert line_on_slowest([0.0, 0.0], 20.0, 10) == ""


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9), st.floats(1, 100))
def test_only_a_rank_out_of_proportion_is_named(own, total):
    line = line_on_slowest(own, total, 5)
    others = sorted(own)[:-1]
    middle = sorted(others)[len(others) // 2]
    if line:
        slowest = own.index(max(own))
        assert f"rank {slowest} " in line and max(own) - min(others) >= SHARE_OF_STEP * total
    elif max(own) - middle >= SHARE_OF_STEP * total:
        assert max(own) <= SLOWER * middle + 1e-9


def test_it_speaks_once_in_a_while():
    watch = SlowRanks()
    num_steps = int(2 * SECONDS_BETWEEN_LOOKS)
    lines = [watch.add([0.1, 0.8], 1.0) for _ in range(num_steps)]
    assert sum(map(bool, lines)) == 2 and lines[-1].startswith("warning: rank 1 is slow")
