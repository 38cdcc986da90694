"""What is done to training images: the same to the same sample wherever it is done, and what the papers say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from largebatch.launch.data.augmentation import (
    davidnet,
    image_transform,
    mixed_with_neighbours,
    mixup_weights,
    neighbours,
)
from largebatch.launch.data.data_set import DataSet, ImageBatch, Images
from largebatch.launch.data.image_loader import ImageLoader
from largebatch.launch.recipe.section import check_section
from largebatch.launch.trainer.classification import Classification

CPU = torch.device("cpu")
MEAN = (0.4914, 0.4822, 0.4465)


def test_davidnet_is_crop_flip_and_cutout_of_the_reflected_image():
    """Each result is found among all that cropping and flipping the padded original can give, cutout aside."""
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    augmented = davidnet(pixels, mean=MEAN, seed=1, samples=np.arange(40))
    assert augmented.shape == pixels.shape and augmented.dtype == torch.uint8
    grey = torch.tensor([125, 123, 114], dtype=torch.uint8).view(3, 1, 1)
    padded = F.pad(pixels.float(), [4] * 4, mode="reflect").to(torch.uint8)
    offsets, flips, holes = set(), [], set()
    for one, bordered in zip(augmented, padded, strict=True):
        is_grey = (one == grey).all(0)
        rows, columns = is_grey.any(1).nonzero(), is_grey.any(0).nonzero()
        holes.add((rows.min().item(), columns.min().item()))
        assert is_grey.sum() >= 64
        found = [
            (row, column, is_flipped)
            for row in range(9)
            for column in range(9)
            for is_flipped in (False, True)
            if same_outside(one, bordered[:, row : row + 32, column : column + 32], is_flipped, is_grey)
        ]
        assert len(found) == 1
        offsets.add(found[0][:2])
        flips.append(found[0][2])
    assert len(offsets) > 20 and len(holes) > 30 and 8 <= sum(flips) <= 32


def same_outside(one, crop, is_flipped, is_grey):
    return torch.equal(one[:, ~is_grey], (crop.flip(2) if is_flipped else crop)[:, ~is_grey])


def loader_of(num_samples, augmentation, mixup):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (num_samples, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.arange(num_samples) % 10)
    data = DataSet("random", images, images, 10, (3, 32, 32), MEAN, (0.25,) * 3)
    return ImageLoader(data, augmentation, mixup)


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_a_sample_is_augmented_alike_in_every_layout_and_after_a_resume(mixup):
    """Sample number p of training, pixels and all, for several micro-batches, worlds and first steps."""
    by_layout = []
    for micro, world, first_step in ((8, 1, 0), (2, 1, 0), (2, 2, 0), (4, 2, 2)):
        samples = {}
        for rank in range(world):
            stream = loader_of(20, "davidnet", mixup).micro_batches(
                seed=7,
                global_batch=8,
                micro_batch=micro,
                rank=rank,
                world_size=world,
                device=CPU,
                first_step=first_step,
            )
            for step in range(first_step, 5):
                for micro_step in range(8 // (micro * world)):
                    batch = next(stream)
                    first = step * 8 + (micro_step * world + rank) * micro
                    for i in range(micro):
                        weight = None if batch.mixup_weights is None else batch.mixup_weights[i]
                        samples[first + i] = (batch.pixels[i], batch.labels[i], weight)
        assert sorted(samples) == list(range(first_step * 8, 40))
        by_layout.append(samples)
    for samples in by_layout[1:]:
        for p, values in samples.items():
            for one, other in zip(values, by_layout[0][p], strict=True):
                assert (one is None and other is None) or torch.equal(one, other)
    first, again = by_layout[0][0][0], {p: v[0] for p, v in by_layout[0].items()}
    assert not any(torch.equal(first, other) for p, other in again.items() if p)


def test_mixup_weights_are_beta_distributed_and_shared_by_neighbours():
    weights = mixup_weights(0.2, seed=3, samples=np.arange(20_000)).double()
    assert torch.equal(weights[::2], weights[1::2]) and 0 <= weights.min() and weights.max() <= 1
    pairs = weights[::2]
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); within 5 standard errors
    assert abs(pairs.mean() - 0.5) < 5 * (1 / (4 * 1.4) / 10_000) ** 0.5
    assert pairs.var().item() == pytest.approx(1 / (4 * 1.4), rel=0.05)


def test_mixup_mixes_images_and_labels_alike():
    inputs = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    weights = mixup_weights(1.0, seed=3, samples=np.arange(6))
    mixed = mixed_with_neighbours(inputs, weights)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    for i, j in ((0, 1), (1, 0), (4, 5), (5, 4)):
        torch.testing.assert_close(mixed[i], weights[i] * inputs[i] + (1 - weights[i]) * inputs[j])
    assert neighbours(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets(smoothing):
    """The loss under mixup and label smoothing is the cross-entropy with targets written out."""
    section = check_section(
        {"largebatch": {"model": "lenet", "data": "digits", "epochs": 1, "mixup": 0.5, "label_smoothing": smoothing}}
    )
    task = Classification(section, None)
    task.loader.data = DataSet("random", None, None, 10, (3, 8, 8), MEAN, (0.25,) * 3)
    batch = ImageBatch(
        torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8),
        torch.tensor([1, 2, 3, 3]),
        mixup_weights(0.5, seed=1, samples=np.arange(4)),
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    loss = task.loss(model, batch, dtype=torch.float32)
    hot = F.one_hot(batch.labels, 10) * (1 - smoothing) + smoothing / 10
    weights = batch.mixup_weights.view(-1, 1)
    targets = weights * hot + (1 - weights) * hot[[1, 0, 3, 2]]
    inputs = mixed_with_neighbours(task.loader.data.inputs(batch.pixels, torch.float32), batch.mixup_weights)
    torch.testing.assert_close(loss, -(targets * model(inputs).log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("level", ["none", "minimal", "inception", "maximal"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (40, 500), (1, 1)])
def test_image_transforms_give_the_size(level, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert image_transform(level, image_size=48, resize_size=64)(image).size == (48, 48)


def test_what_the_levels_do():
    """The level "none" always gives the centre; "minimal" a piece of it, flipped or not; "inception" of any size; "maximal" other colours."""
    ramp = np.broadcast_to(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], (128, 128, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    seen = {}
    for level in ("none", "minimal", "inception", "maximal"):
        transform = image_transform(level, image_size=56, resize_size=64)
        seen[level] = [np.array(transform(image)).astype(int) for _ in range(20)]
    resized = np.array(image.resize((64, 64), Image.BILINEAR)).astype(int)
    assert all(np.array_equal(one, resized[4:60, 4:60]) for one in seen["none"])
    starts, num_flipped = set(), 0
    for one in seen["minimal"]:
        is_flipped = one[0, 0, 0] > one[0, -1, 0]
        upright = one[:, ::-1] if is_flipped else one
        (start,) = (c for c in range(9) if np.array_equal(upright, resized[:56, c : c + 56]))
        starts.add(start)
        num_flipped += is_flipped
    assert len(starts) >= 4 and 3 <= num_flipped <= 17
    for level in ("inception", "maximal"):
        widths = {abs(one[0, -1].sum() - one[0, 0].sum()) for one in seen[level]}
        assert len(widths) > 10
    plain = Image.new("RGB", (64, 64), (90, 120, 150))
    colours = {
        level: {image_transform(level, image_size=32, resize_size=40)(plain).getpixel((5, 5)) for _ in range(10)}
        for level in ("minimal", "inception", "maximal")
    }
    assert colours["minimal"] == colours["inception"] == {(90, 120, 150)} and len(colours["maximal"]) > 5
