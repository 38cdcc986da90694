"""The papers' ImageNet recipes on a folder of photographs, through the launcher: as they are but for size and length."""

import json
import os
import shutil

import pytest

from support import launching

pytestmark = pytest.mark.launcher


def train(recipe, folder, output, *, size, batch, micro, steps, options=()):
    return launching.train(
        "--deepspeed_config", f"ds_configs/{recipe}.json", "--data", folder, "--output", output, "--steps", steps,
        "--set", f"train_batch_size={batch}", "--set", f"train_micro_batch_size_per_gpu={micro}",
        "--set", f"largebatch.data_options.image_size={size}", "--set", f"largebatch.data_options.resize_size={size + 16}",
        *options,
    )  # fmt: skip


def test_resnet50_trains_from_files_and_names_damaged_images(image_folder, tmp_path):
    """32K recipe of the LARS paper: ghost batches of 32 on two ranks, bf16, workers, one damaged file of 800."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    damaged = sorted((folder / "train" / "watch").iterdir())[3]
    damaged.write_bytes(damaged.read_bytes()[:2000])
    settings = dict(size=64, batch=128, micro=32, options=("--set", "largebatch.batch_norm.ghost_batch_size=32"))
    train("resnet50_imagenet_lars_32k_minaug", folder, tmp_path / "run", steps=7, **settings)
    (start,) = launching.events(tmp_path / "run", "start")
    assert start["config"]["optimizer"]["type"] == "LARS" and start["config"]["gradient_accumulation_steps"] == 2
    steps = launching.events(tmp_path / "run", "step")
    assert [e["step"] for e in steps] == list(range(1, 8)), "896 images: over the end of the epoch"
    assert all(0 < e["loss"] < 20 for e in steps)
    (unreadable,) = launching.events(tmp_path / "run", "unreadable")
    assert list(unreadable["files"]) == [str(damaged)] and unreadable["count"] == 1
    (end,) = launching.events(tmp_path / "run", "end")
    assert 0 <= end["top1"] <= end["top5"] <= 1


@pytest.mark.parametrize("recipe", ["alexnet_imagenet_lars_32k", "alexnet_bn_imagenet_lars_32k"])
def test_alexnet_trains_from_files(image_folder, tmp_path, recipe):
    options = ("--set", "largebatch.batch_norm.ghost_batch_size=4") if "_bn_" in recipe else ()
    out = train(recipe, image_folder, tmp_path, size=67, batch=16, micro=4, steps=2, options=options)
    assert "bf16" in out and ("running statistics" in out) == ("_bn_" in recipe)
    (end,) = launching.events(tmp_path, "end")
    assert 0 <= end["top1"] <= end["top5"] <= 1
    written = json.loads((tmp_path / "ds_config.json").read_text())
    assert written["gradient_accumulation_steps"] == 2 and os.path.isdir(tmp_path / "checkpoints" / "step2")
