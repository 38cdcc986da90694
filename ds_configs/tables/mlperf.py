"""MLPerf training, ResNet-50 with LARS: the reference convergence points (mlcommons/logging, rcps_resnet.json).

Evaluation stops at 75.9%; the expected accuracy is that target and is reached some epochs before the end. The decay begins
after the warm-up and ends at 1e-4 (mlcommons/training, resnet-tf2). ``opt_learning_rate_decay_steps`` gives the length:
NVIDIA counts the warm-up in, Google does not (of 32768 the length is that of NVIDIA's v0.7 run with the same settings: 58
epochs). The weight decay of 2048 is printed as 2e-3, which is taken for a slip of 2e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import IMAGENET_224, batch_name, poly, recipe, top1

ROWS = (
    (1632, 7.4, 2, 0.9, 5e-5, 35, 204, 35.0, "8 GPUs (204 images each)"),
    (2048, 8.5, 5, 0.9, 2e-4, 41, 64, 38.4, "not given"),
    (3264, 10.5, 2, 0.9, 5e-5, 37, 204, 35.2, "16 GPUs (204 images each)"),
    (4096, 10, 5, 0.9, 2e-4, 47, 64, 40.0, "TPU-v4-64"),
    (8192, 17, 5, 0.9, 2e-4, 44, 64, 42.0, "TPU-v4-128"),
    (13056, 12.8, 9, 0.9, 2.5e-5, 48, 204, 45.4, "64 GPUs (204 images each)"),
    (32768, 21.2, 16, 0.94, 2.5e-5, 58, 128, 56.0, "TPU-v4-32"),
    (49152, 19.405, 24, 0.951807, 1e-4, 71, 256, 68.0, "not given"),
    (58880, 23.246, 29, 0.951807, 1e-4, 82, 230, 79.9, "not given"),
    (65536, 24.699, 31, 0.951807, 1e-4, 89, 128, 84.5, "TPU-v3-512"),
)
"""Batch, learning rate, warm-up epochs, momentum, weight decay, epochs in all, ghost batch size in images, mean
epochs to 75.9%, hardware."""


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for batch, lr, warmup_epochs, momentum, weight_decay, epochs, ghost_batch_size, to_target, hardware in ROWS:
        yield (
            f"resnet50_imagenet_lars_{batch_name(batch)}_mlperf",
            recipe(
                model="resnet50",
                model_options={"classifier_std": 0.01},
                **IMAGENET_224,
                augmentation="inception",
                label_smoothing=0.1,
                batch_norm={"ghost_batch_size": ghost_batch_size},
                batch=batch,
                epochs=epochs,
                optimizer="LARS",
                params={
                    "lr": lr,
                    "momentum": momentum,
                    "weight_decay": weight_decay,
                    "trust_coefficient": 0.001,
                    "preset": "mlperf",
                },
                scheduler=poly(warmup_epochs, end_lr=0.0001),
                source=f"MLPerf training, rcps_resnet.json, resnet_ref_{batch}: 75.9% after {to_target} epochs in the mean",
                expected=top1(0.759, 0.003),
                hardware=hardware,
            ),
        )
