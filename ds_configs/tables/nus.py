"""ResNet-50 with LARS by the first author's group: github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, README.

Learning rate by the square root of the batch; outside the momentum, the trust ratio clamped to [0, 50]. Their clamp of each
gradient element to [-10, 10] is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import (
    BIAS_AND_NORM_OUT,
    IMAGENET_224,
    K,
    batch_name,
    poly,
    recipe,
    scaled,
    top1,
)

ROWS = (
    (512, 0.15625, 1e-5, 64, 0.7702),
    (1 * K, 0.3125, 1e-5, 128, 0.7696),
    (4 * K, 1.25, 1e-5, 128, 0.7738),
    (8 * K, 2.5, 1e-5, 128, 0.7714),
    (16 * K, 5, 1e-5, 128, 0.7696),
    (32 * K, 14, 0.0, 64, 0.7675),
)
"""Batch, warm-up epochs, eps, images a GPU, top-1."""


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for batch, warmup_epochs, eps, ghost_batch_size, accuracy in ROWS:
        yield (
            f"resnet50_imagenet_lars_{batch_name(batch)}_nus",
            recipe(
                model="resnet50",
                model_options={"zero_init_last_gamma": False},
                **IMAGENET_224,
                augmentation="inception",
                label_smoothing=0.1,
                batch_norm={"ghost_batch_size": ghost_batch_size},
                batch=batch,
                epochs=90,
                lr_scaling=scaled("sqrt", 4, 512),
                optimizer="LARS",
                params={
                    "lr": "auto",
                    "momentum": 0.9,
                    "weight_decay": 0.0001,
                    "trust_coefficient": 0.001,
                    "eps": eps,
                    "lr_in_momentum": False,
                    "trust_ratio_bounds": [0, 50],
                    **BIAS_AND_NORM_OUT,
                },
                scheduler=poly(warmup_epochs),
                source=f"github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, README, batch {batch}",
                expected=top1(accuracy),
                hardware=f"V100 or P100, {ghost_batch_size} images each",
            ),
        )
