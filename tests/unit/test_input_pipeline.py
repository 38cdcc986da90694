"""The order of the data: the same global batches however they are cut, and nothing lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.launch.inputs.data_set import Images
from largebatch.launch.inputs.in_memory import load_data
from largebatch.launch.inputs.loading import micro_batches
from largebatch.launch.inputs.sample_order import SampleOrder


def test_an_epoch_is_a_permutation_and_each_is_another():
    order = SampleOrder(100, seed=3)
    epochs = [order.indices(e * 100, (e + 1) * 100) for e in range(3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(100))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert torch.equal(SampleOrder(100, seed=3).indices(130, 270), torch.cat(epochs)[130:270])
    assert not torch.equal(SampleOrder(100, seed=4).indices(0, 100), epochs[0])


def batches(num_samples, micro, accumulation, world, rank, step, seed=1):
    images = Images(torch.arange(num_samples, dtype=torch.int32).view(-1, 1, 1, 1), torch.arange(num_samples))
    return micro_batches(
        images,
        seed=seed,
        global_batch=micro * accumulation * world,
        micro_batch=micro,
        rank=rank,
        world_size=world,
        device=torch.device("cpu"),
        first_step=step,
    )


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(1, 60),
    cut=st.sampled_from([(12, 1, 1), (1, 12, 1), (3, 4, 1), (3, 2, 2), (2, 2, 3), (1, 3, 4), (12, 1, 1)]),
    step=st.integers(0, 20),
)
def test_global_batches_do_not_depend_on_micro_batch_and_world_size(num_samples, cut, step):
    micro, accumulation, world = cut
    seen = []
    for rank in range(world):
        stream = batches(num_samples, micro, accumulation, world, rank, step)
        for _ in range(accumulation):
            pixels, labels = next(stream)
            assert torch.equal(pixels.flatten().long(), labels)
            seen.extend(labels.tolist())
    whole = SampleOrder(num_samples, seed=1).indices(step * 12, (step + 1) * 12)
    assert sorted(seen) == sorted(whole.tolist())


def test_digits():
    data = load_data("digits", None)
    assert (len(data.train), len(data.test), data.num_classes, data.image_shape) == (1437, 360, 10, (1, 8, 8))
    inputs = data.inputs(data.train.pixels, torch.float32)
    assert abs(inputs.mean()) < 1e-4 and abs(inputs.std() - 1) < 1e-3
    assert torch.bincount(data.test.labels).min() >= 34  # stratified


def test_mnist(mnist_folder):
    data = load_data("mnist", mnist_folder)
    assert (len(data.train), len(data.test), data.image_shape) == (60000, 10000, (1, 28, 28))
    assert torch.bincount(data.train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.mean == pytest.approx(0.1307, abs=1e-4) and data.std == pytest.approx(0.3081, abs=1e-4)


def test_missing_data_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="mnist needs the folder that holds MNIST/"):
        load_data("mnist", None)
    with pytest.raises(ValueError, match="which is not a folder"):
        load_data("mnist", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no MNIST; expected .* with the four unpacked files"):
        load_data("mnist", str(tmp_path))
    with pytest.raises(ValueError, match="the digits come with scikit-learn; leave --data out"):
        load_data("digits", str(tmp_path))
