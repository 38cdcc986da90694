"""The order of the data: the same global batches however they are cut, and nothing lost; the data sets in memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.launch.data.data_set import DataSet, Images
from largebatch.launch.data.image_loader import ImageLoader, evaluation_indices
from largebatch.launch.data.options import check_data_options
from largebatch.launch.data.sample_order import SampleOrder, hashes, integers, uniforms
from largebatch.launch.data.sources import load_data
from largebatch.launch.data.synthetic import load_synthetic

CPU = torch.device("cpu")


def test_an_epoch_is_a_permutation_and_each_is_another():
    order = SampleOrder(100, seed=3)
    epochs = [order.indices(e * 100, (e + 1) * 100) for e in range(3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(100))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert torch.equal(SampleOrder(100, seed=3).indices(130, 270), torch.cat(epochs)[130:270])
    assert not torch.equal(SampleOrder(100, seed=4).indices(0, 100), epochs[0])


def numbered(num_samples):
    """A data set whose pixels tell which image it is."""
    images = Images(torch.arange(num_samples, dtype=torch.int32).view(-1, 1, 1, 1), torch.arange(num_samples))
    return DataSet("numbered", images, images, num_samples, (1, 1, 1), (0.0,), (1.0,))


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
        stream = ImageLoader(numbered(num_samples)).micro_batches(
            seed=1, global_batch=12, micro_batch=micro, rank=rank, world_size=world, device=CPU, first_step=step
        )
        for _ in range(accumulation):
            batch = next(stream)
            assert torch.equal(batch.pixels.flatten().long(), batch.labels) and batch.mixup_weights is None
            seen.extend(batch.labels.tolist())
    whole = SampleOrder(num_samples, seed=1).indices(step * 12, (step + 1) * 12)
    assert sorted(seen) == sorted(whole.tolist())


@settings(max_examples=100, deadline=None)
@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 20), world=st.integers(1, 8))
def test_an_evaluation_counts_every_image_once(num_samples, batch_size, world):
    counted, num_batches = [], set()
    for rank in range(world):
        batches = list(evaluation_indices(num_samples, batch_size=batch_size, rank=rank, world_size=world))
        num_batches.add(tuple(len(indices) for indices, _ in batches))
        for indices, counts in batches:
            assert len(indices) <= batch_size and 0 <= indices.min() and indices.max() < num_samples
            counted += indices[counts].tolist()
    assert sorted(counted) == list(range(num_samples))
    assert len(num_batches) == 1, "under ZeRO 3 the ranks' forward passes have to match"


def test_random_numbers_depend_on_seed_sample_and_stream_alone():
    samples = np.arange(5000)
    drawn = uniforms(3, samples, 0)
    assert np.array_equal(uniforms(3, samples[1000:1010], 0), drawn[1000:1010])
    assert 0 <= drawn.min() and drawn.max() < 1
    # mean and variance of a uniform distribution, within 5 standard errors
    assert abs(drawn.mean() - 1 / 2) < 5 * (1 / 12 / 5000) ** 0.5
    assert abs(drawn.var() - 1 / 12) < 5 * (1 / 180 / 5000) ** 0.5
    others = (uniforms(4, samples, 0), uniforms(3, samples, 1), uniforms(3, samples + 1, 0))
    for other in others:  # no correlation, within 5 standard errors
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 5 / 5000**0.5
    assert len(np.unique(hashes(3, samples, 0))) == 5000
    counts = np.bincount(integers(3, samples, 2, 10), minlength=10)
    assert len(counts) == 10 and abs(counts - 500).max() < 5 * (500 * 0.9) ** 0.5


def test_digits():
    data = load_data("digits", None)
    assert (len(data.train), len(data.test), data.num_classes, data.image_shape) == (1437, 360, 10, (1, 8, 8))
    inputs = data.inputs(data.train.pixels, torch.float32)
    assert abs(inputs.mean()) < 1e-4 and abs(inputs.std() - 1) < 1e-3
    assert torch.bincount(data.test.labels).min() >= 34  # stratified


def test_inputs_may_be_left_unnormalised():
    data = load_data("digits", None, {"normalize": False})
    assert torch.equal(data.inputs(data.test.pixels, torch.float32), data.test.pixels.float() / 255)
    with pytest.raises(TypeError, match="largebatch.data_options.normalize is 0; expected true or false"):
        check_data_options("digits", {"normalize": 0})


def test_settings_are_chosen_on_held_out_training_images():
    whole, data = load_data("digits", None), load_data("digits", None, {"held_out": 400})
    assert (len(data.train), len(data.test), data.num_classes) == (1037, 400, 10)
    pixels = torch.cat([data.train.pixels, data.test.pixels])
    assert torch.equal(pixels, whole.train.pixels), "the test set is not seen, and no training image is lost"
    assert torch.equal(data.test.labels, whole.train.labels[1037:])
    assert abs(data.inputs(data.train.pixels, torch.float32).mean()) < 1e-4, "statistics of what is trained on"
    assert "400 held-out" in data.name
    with pytest.raises(ValueError, match="largebatch.data_options.held_out is 1437; expected an integer < 1437"):
        load_data("digits", None, {"held_out": 1437})
    with pytest.raises(ValueError, match="largebatch.data_options.held_out is -1; expected an integer >= 0"):
        check_data_options("digits", {"held_out": -1})


def test_mnist(mnist_folder):
    data = load_data("mnist", mnist_folder)
    assert (len(data.train), len(data.test), data.image_shape) == (60000, 10000, (1, 28, 28))
    assert torch.bincount(data.train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.mean == pytest.approx((0.1307,), abs=1e-4) and data.std == pytest.approx((0.3081,), abs=1e-4)


def test_cifar10(cifar10_folder):
    data = load_data("cifar10", cifar10_folder)
    assert (len(data.train), len(data.test), data.image_shape, data.num_classes) == (50000, 10000, (3, 32, 32), 10)
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    # github.com/davidcpage/cifar10-fast normalises with these
    assert [255 * m for m in data.mean] == pytest.approx([125.31, 122.95, 113.87], abs=5e-3)
    assert [255 * s for s in data.std] == pytest.approx([62.99, 62.09, 66.70], abs=5e-3)
    inputs = data.inputs(data.train.pixels[:5000], torch.float32)
    assert inputs.mean((0, 2, 3)).abs().max() < 0.03
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_synthetic_images_are_a_function_of_their_number():
    data = load_synthetic(num_samples=10**9, num_test_samples=500, image_shape=(3, 20, 30), num_classes=7)
    assert (len(data.train), len(data.test), data.image_shape, data.num_classes) == (10**9, 500, (3, 20, 30), 7)
    numbers = torch.tensor([5, 999_999_999, 123, 5])
    pixels, labels = data.train.batch(numbers)
    assert pixels.shape == (4, 3, 20, 30) and pixels.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(pixels[0], pixels[3]) and not torch.equal(pixels[0], pixels[2])
    alone, label = data.train.batch(numbers[1:2])
    assert torch.equal(alone[0], pixels[1]) and label == labels[1]
    first = [part.batch(torch.arange(200)) for part in (data.train, data.test)]
    assert not torch.equal(first[0][0], first[1][0]), "test images are others than training images"
    assert len(first[0][1].unique()) == 7
    inputs = data.inputs(first[0][0], torch.float32)
    assert abs(inputs.mean()) < 0.5 and 0.5 < inputs.std() < 1.5


def test_missing_data_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="mnist needs the folder that holds MNIST/"):
        load_data("mnist", None)
    with pytest.raises(ValueError, match="which is not a folder"):
        load_data("mnist", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no MNIST; expected .* with the four unpacked files"):
        load_data("mnist", str(tmp_path))
    with pytest.raises(ValueError, match="holds no CIFAR-10, or a damaged one; expected .* with data_batch_1"):
        load_data("cifar10", str(tmp_path))
    with pytest.raises(ValueError, match="the digits come with scikit-learn; leave --data out"):
        load_data("digits", str(tmp_path))
    with pytest.raises(ValueError, match="synthetic images are made up; leave --data out"):
        load_data("synthetic", str(tmp_path))
