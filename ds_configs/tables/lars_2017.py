"""LARS, arXiv:1708.03888: the tables of the ICLR 2018 submission (arXiv v3 has other learning rates and accuracies).

100 epochs, momentum 0.9, weight decay 5e-4, trust coefficient 0.001, every layer adapted. The decay (1 - t/T)^2 runs from
the first step, as in the authors' Caffe (NVIDIA/caffe sgd_solver.cpp). Accuracies are means of the last five epochs.
Ghost batch sizes of batch normalisation are not in the paper: here a GPU's share on 8 GPUs of what the published solvers put into one
pass, at most 8,192 images for AlexNet-BN and 1,024 for ResNet-50.

The published solvers themselves (NVIDIA/caffe, models/) are the rows "author": other learning rates, the ratio of
``preset`` "author", and a quadratic ramp-up from learning rate 1. No accuracies come with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import IMAGENET_224, IMAGENET_227, K, batch_name, poly, recipe, top1

PAPER = "arXiv:1708.03888 (ICLR 2018 submission)"
SGD = {"momentum": 0.9, "weight_decay": 0.0005}
LARS = {"momentum": 0.9, "weight_decay": 0.0005, "trust_coefficient": 0.001}
HARDWARE = "8 P100 (NVIDIA DGX-1), with accumulation at 16K and 32K"

ALEXNET = {"model": "alexnet", **IMAGENET_227}
ALEXNET_BN = {"model": "alexnet_bn", **IMAGENET_227}
RESNET50 = {"model": "resnet50", **IMAGENET_224}
GOOGLENET = {"model": "googlenet", **IMAGENET_224}
LARGEST_PASS = {"alexnet_bn": 8 * K, "resnet50": 1 * K, "googlenet": 1 * K}
NUM_GPUS = 8

ALEXNET_WITH_LARS = {512: (2, 0.587), 4 * K: (10, 0.585), 8 * K: (10, 0.582), 16 * K: (14, 0.550), 32 * K: (14, 0.469)}
ALEXNET_BN_WITH_LARS = {
    512: (2, 0.602),
    4 * K: (10, 0.604),
    8 * K: (14, 0.601),
    16 * K: (23, 0.593),
    32 * K: (22, 0.578),
}
ALEXNET_WITHOUT = {512: (0.02, 0.588), 4 * K: (0.05, 0.531), 8 * K: (0.03, 0.448)}
ALEXNET_BN_WITHOUT = {512: (0.02, 0.602), 4 * K: (0.18, 0.589), 8 * K: (0.30, 0.580)}
"""Batch -> (learning rate, top-1); of several learning rates the best."""

RESNET50_ROWS = (
    (256, 4, 0, 0.738, 0.758),
    (1 * K, 9, 5, 0.733, 0.754),
    (8 * K, 30, 5, 0.735, 0.752),
    (16 * K, 33, 12, 0.729, 0.744),
    (32 * K, 40, 12, 0.725, 0.725),
)
"""Batch, learning rate, warm-up epochs, top-1 with minimal and with maximal augmentation."""

GOOGLENET_ROWS = (
    ("SGD", 256, 0.02, 100, 0, 0.692),
    ("LARS", 256, 4, 100, 5, 0.703),
    ("LARS", 1 * K, 6, 100, 10, 0.697),
    ("LARS", 2 * K, 7, 150, 25, 0.711),
    ("LARS", 4 * K, 10, 200, 30, 0.699),
    ("LARS", 8 * K, 10, 250, 60, 0.690),
    ("LARS", 16 * K, 10, 350, 110, 0.672),
)
"""Optimizer, batch, learning rate, epochs, warm-up epochs, top-1."""

AUTHOR_ROWS = (
    (ALEXNET, 8 * K, 10, 15600, 0, {}, "bvlc_alexnet/solver_8K.prototxt"),
    (ALEXNET, 16 * K, 16, 7800, 0, {}, "bvlc_alexnet/solver_16K.prototxt"),
    (ALEXNET_BN, 8 * K, 10, 15600, 600, {}, "alexnet_bn/solver_8K.prototxt"),
    (ALEXNET_BN, 16 * K, 24, 7800, 400, {}, "alexnet_bn/solver_16k.prototxt"),
    (ALEXNET_BN, 32 * K, 32, 4000, 400, {}, "alexnet_bn/solver_32k.prototxt"),
    (RESNET50, 256, 0.2, 500_000, 0, {}, "resnet50/solver.prototxt"),
    (RESNET50, 512, 4, 250_000, 0, {"weight_decay": 0.0001}, "resnet50/solver_512.prototxt"),
    (RESNET50, 1 * K, 1, 125_000, 0, {"trust_coefficient": 0.002}, "resnet50/solver_1K.prototxt"),
)
"""Network, batch, learning rate, steps, warm-up steps, what else differs, file."""


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for network, rows, optimizer, warmup_epochs, table in (
        (ALEXNET, ALEXNET_WITH_LARS, "LARS", 2, "AlexNet with LARS"),
        (ALEXNET_BN, ALEXNET_BN_WITH_LARS, "LARS", 5, "AlexNet-BN with LARS"),
        (ALEXNET, ALEXNET_WITHOUT, "SGD", 2.5, "AlexNet without LARS"),
        (ALEXNET_BN, ALEXNET_BN_WITHOUT, "SGD", 0, "AlexNet-BN without LARS"),
    ):
        for batch, (lr, accuracy) in rows.items():
            name = f"{network['model']}_imagenet_{optimizer.lower()}_{batch_name(batch)}"
            yield name, row(network, batch, optimizer, lr, warmup_epochs, table=table, expected=top1(accuracy))
    for batch, lr, warmup_epochs, *accuracies in RESNET50_ROWS:
        for augmentation, accuracy in zip(("minimal", "maximal"), accuracies, strict=True):
            name = f"resnet50_imagenet_lars_{batch_name(batch)}_{augmentation[:3]}aug"
            table = f"ResNet-50, {augmentation} augmentation"
            yield name, row(
                RESNET50, batch, "LARS", lr, warmup_epochs, table=table, expected=top1(accuracy), augmentation=augmentation
            )  # fmt: skip
    for optimizer, batch, lr, epochs, warmup_epochs, accuracy in GOOGLENET_ROWS:
        name = f"googlenet_imagenet_{optimizer.lower()}_{batch_name(batch)}"
        table = "GoogLeNet (appendix; torchvision's network here, which has batch normalisation)"
        expected = top1(accuracy, 0.02, is_approximate=True)
        yield name, row(GOOGLENET, batch, optimizer, lr, warmup_epochs, table=table, expected=expected, epochs=epochs)
    for network, batch, lr, num_steps, num_warmup_steps, params, file in AUTHOR_ROWS:
        yield (
            f"{network['model']}_imagenet_lars_{batch_name(batch)}_author",
            author_row(network, batch, lr, num_steps, num_warmup_steps, params=params, file=file),
        )


def ghost_batch_of(network: dict[str, Any], batch: int) -> dict[str, Any]:
    """The "batch_norm" entry."""
    if network["model"] not in LARGEST_PASS:
        return {}
    return {"batch_norm": {"ghost_batch_size": min(batch, LARGEST_PASS[network["model"]]) // NUM_GPUS}}


def row(
    network: dict[str, Any],
    batch: int,
    optimizer: str,
    lr: float,
    warmup_epochs: float,
    *,
    table: str,
    expected: dict[str, Any],
    augmentation: str = "minimal",
    epochs: int = 100,
) -> dict[str, Any]:
    return recipe(
        **network,
        **ghost_batch_of(network, batch),
        augmentation=augmentation,
        batch=batch,
        epochs=epochs,
        optimizer=optimizer,
        params={"lr": lr, **(LARS if optimizer == "LARS" else SGD)},
        scheduler=poly(warmup_epochs, decay_from="start"),
        source=f"{PAPER}, table of {table}, batch {batch}",
        expected=expected,
        hardware=HARDWARE,
    )


def author_row(
    network: dict[str, Any],
    batch: int,
    lr: float,
    num_steps: int,
    num_warmup_steps: int,
    *,
    params: dict[str, Any],
    file: str,
) -> dict[str, Any]:
    warmup = {"warmup_steps": num_warmup_steps, "warmup_start_factor": 1 / lr, "warmup_power": 2}
    return recipe(
        **network,
        **ghost_batch_of(network, batch),
        augmentation="minimal",
        batch=batch,
        steps=num_steps,
        optimizer="LARS",
        params={"lr": lr, **LARS, **params, "preset": "author"},
        scheduler={
            "type": "WarmupPolyLR",
            "total_steps": "auto",
            **(warmup if num_warmup_steps else {}),
            "power": 2,
            "decay_from": "start",
        },
        source=f"github.com/NVIDIA/caffe (the code of arXiv:1708.03888), models/{file}",
        expected=None,
        hardware=HARDWARE,
    )
