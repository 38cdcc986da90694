"""Images in files: listed, read, sharded, resumed; damaged and mis-shaped folders."""

import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from largebatch.launch.data import image_loader
from largebatch.launch.data.file_loading import Reading
from largebatch.launch.data.image_folder import UnreadableImageError, load_image_folder, read_image
from largebatch.launch.data.image_loader import ImageLoader
from largebatch.launch.data.sample_order import SampleOrder

CPU = torch.device("cpu")
HERE = Reading(workers=0, prefetch=2, is_replaced=True)


def write_folder(folder, num_train=10, num_val=4, classes=("ant", "bee")):
    """Images of one colour each: image i of a class has red 10 i, and green 200 in the second class."""
    for part, number in (("train", num_train), ("val", num_val)):
        for label, name in enumerate(classes):
            os.makedirs(folder / part / name)
            for i in range(number):
                Image.new("RGB", (20 + i, 30), (10 * i, 200 * label, 7)).save(folder / part / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"))


def loader_for(folder, augmentation="none", reading=HERE, **options):
    return ImageLoader(load_image_folder(str(folder), 16), augmentation, resize_size=18, reading=reading, **options)


def identity(pixels):
    """[(i, label)] of the one-coloured images."""
    return [(int(p[0, 0, 0]) // 10, int(p[1, 0, 0]) // 200) for p in pixels]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.sampled_from([(12, 1), (1, 1), (4, 1), (3, 2), (2, 3), (3, 4)]), step=st.integers(0, 5))
def test_sharding_loses_and_doubles_nothing(small_folder, cut, step):
    """A global batch of 12 out of 20 images, over the ends of epochs, in every layout."""
    micro, world = cut
    seen = []
    for rank in range(world):
        stream = loader_for(small_folder).micro_batches(
            seed=1, global_batch=12, micro_batch=micro, rank=rank, world_size=world, device=CPU, first_step=step
        )
        for _ in range(12 // (micro * world)):
            batch = next(stream)
            assert [label for _, label in identity(batch.pixels)] == batch.labels.tolist()
            seen += identity(batch.pixels)
    wanted = SampleOrder(20, seed=1).indices(step * 12, step * 12 + 12).tolist()
    assert sorted(seen) == sorted((i % 10, i // 10) for i in wanted)


@pytest.mark.parametrize("augmentation", ["minimal", "maximal"])
def test_workers_layout_and_resume_change_no_pixel(image_folder, augmentation, monkeypatch):
    """Real photographs, read by this process, by two workers, by two ranks, after a resume, and three at a time."""

    def samples(world, workers, first_step):
        found = {}
        for rank in range(world):
            loader = ImageLoader(
                load_image_folder(image_folder, 32), augmentation, resize_size=40, reading=Reading(workers, 2, True)
            )
            stream = loader.micro_batches(
                seed=3, global_batch=8, micro_batch=4, rank=rank, world_size=world, device=CPU, first_step=first_step
            )
            for step in range(first_step, 4):
                for micro_step in range(8 // (4 * world)):
                    batch = next(stream)
                    for i in range(4):
                        p = step * 8 + (micro_step * world + rank) * 4 + i
                        found[p] = (batch.pixels[i].clone(), batch.labels[i].item())
            stream.close()
        return found

    whole = samples(1, 0, 0)
    monkeypatch.setattr(image_loader, "CHUNK", 3)
    for world, workers, first_step in ((1, 2, 0), (2, 0, 0), (1, 0, 2)):
        for p, (pixels, label) in samples(world, workers, first_step).items():
            assert torch.equal(pixels, whole[p][0]) and label == whole[p][1]
    assert len({label for _, label in whole.values()}) > 5


def test_reading_leaves_the_random_state_alone(small_folder):
    """Dropout draws from torch's generator while this process reads."""
    stream = loader_for(small_folder, "maximal").micro_batches(
        seed=1, global_batch=4, micro_batch=4, rank=0, world_size=1, device=CPU
    )
    next(stream)
    before = torch.get_rng_state()
    next(stream)
    assert torch.equal(before, torch.get_rng_state())


def test_inputs_are_normalised_and_channels_last(small_folder):
    loader = loader_for(small_folder)
    batch = next(loader.micro_batches(seed=1, global_batch=4, micro_batch=4, rank=0, world_size=1, device=CPU))
    inputs = loader.data.inputs(batch.pixels, torch.float32)
    assert inputs.is_contiguous(memory_format=torch.channels_last) and batch.pixels.dtype == torch.uint8
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = (batch.pixels.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(inputs.double(), wanted, rtol=0, atol=1e-6)


def damaged(folder, how):
    """Copies of a class with two unreadable files in a row: 03 and 04."""
    for name in ("03.png", "04.png"):
        path = folder / "train" / "bee" / name
        content = path.read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "text": b"no image", "empty": b""}[how])
    return folder


@pytest.mark.parametrize("how", ["cut", "text", "empty"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_counted_and_replaced_by_the_next(tmp_path, capsys, how, workers):
    folder = damaged(write_folder(tmp_path), how)
    loader = loader_for(folder, reading=Reading(workers, 2, True))
    stream = loader.micro_batches(seed=1, global_batch=20, micro_batch=20, rank=0, world_size=1, device=CPU)
    seen = identity(next(stream).pixels)
    stream.close()
    wanted = SampleOrder(20, seed=1).indices(0, 20).tolist()
    stands_in = {13: 15, 14: 15}  # images 10..19 are the bees
    assert seen == [divmod(stands_in.get(i, i), 10)[::-1] for i in wanted]
    assert sorted(map(os.path.basename, loader.unreadable)) == ["03.png", "04.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("cannot be read" in line and "replaced by the next image" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_the_run_if_asked(tmp_path, workers):
    loader = loader_for(damaged(write_folder(tmp_path), "cut"), reading=Reading(workers, 2, False))
    stream = loader.micro_batches(seed=1, global_batch=20, micro_batch=20, rank=0, world_size=1, device=CPU)
    with pytest.raises(
        UnreadableImageError, match=r"0[34].png' cannot be read .* set largebatch.data_options.on_corrupt"
    ):
        next(stream)


def test_a_damaged_test_image_is_left_out(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "val" / "ant" / "02.png").write_bytes(b"no image")
    counted = []
    for rank in range(3):
        loader = loader_for(folder)
        for pixels, labels, counts in loader.test_batches(batch_size=2, rank=rank, world_size=3, device=CPU):
            assert pixels.shape == (len(labels), 3, 16, 16)
            counted += [one for one, is_counted in zip(identity(pixels), counts, strict=True) if is_counted]
    assert sorted(counted) == sorted((i, label) for i in range(4) for label in range(2) if (i, label) != (2, 0))


def test_no_readable_image_at_all(tmp_path):
    folder = write_folder(tmp_path)
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    stream = loader_for(folder).micro_batches(seed=1, global_batch=2, micro_batch=2, rank=0, world_size=1, device=CPU)
    with pytest.raises(UnreadableImageError, match="none of the 20 images beside .* can be read"):
        next(stream)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (9, 11), dtype=np.uint8)
    for mode in ("L", "RGB", "RGBA", "CMYK", "P", "1", "I;16"):
        image = Image.fromarray(array.astype(np.uint16) if mode == "I;16" else array)
        path = str(tmp_path / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}")
        (image if mode == "I;16" else image.convert(mode)).save(path)
        assert read_image(path).mode == "RGB" and read_image(path).size == (11, 9)


def test_real_folder(image_folder):
    data = load_image_folder(image_folder, 224)
    assert (len(data.train), len(data.test), data.num_classes, data.image_shape) == (800, 200, 20, (3, 224, 224))
    assert torch.bincount(data.train.labels).tolist() == [40] * 20
    # torchvision's ImageFolder numbers classes and sorts files the same way
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(os.path.join(image_folder, "train"))
    assert [path for path, _ in theirs.samples] == data.train.paths and theirs.targets == data.train.labels.tolist()


def reshape(folder, how):
    if how == "no val":
        shutil.rmtree(folder / "val")
    elif how == "flat":
        for path in list((folder / "train").rglob("*.png")):
            path.rename(folder / "train" / f"{path.parent.name}{path.name}")
        for path in list((folder / "train").iterdir()):
            if path.is_dir():
                path.rmdir()
    elif how == "empty":
        for name in ("ant", "bee"):
            shutil.rmtree(folder / "train" / name)
    elif how == "empty class":
        for path in (folder / "val" / "bee").iterdir():
            path.rename(path.with_suffix(".txt"))
    elif how == "other classes":
        (folder / "val" / "bee").rename(folder / "val" / "wasp")
    elif how == "one class":
        for part in ("train", "val"):
            shutil.rmtree(folder / part / "bee")
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "which is not a folder; expected DIR/train/<class>/<image> and DIR/val/<class>/<image>"),
        ("no val", "has no folder 'val' (it holds train)"),
        ("flat", "holds 20 images but no folders, one for each class"),
        ("empty", "holds no folders, one for each class"),
        ("empty class", "1 of 2 folders in"),
        ("other classes", "different classes in train and val: val lacks 'bee'; train lacks 'wasp'"),
        ("one class", "has one class only, 'ant'"),
    ],
)
def test_mis_shaped_folders(tmp_path, how, message):
    folder = write_folder(tmp_path / "images")
    reshape(folder, how)
    with pytest.raises(ValueError) as caught:
        load_image_folder(str(folder), 16)
    assert message in str(caught.value)
