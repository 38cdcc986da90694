"""Nesterov SGD on ResNet-50, arXiv:1706.02677: linear scaling, five epochs of warm-up, x0.1 at epochs 30, 60 and 80.

Batch normalisation over the 32 images of a GPU; its scales and shifts are not decayed. Beyond 8K the paper shows how the
rule fails; 16K is also the momentum row of arXiv:1904.00962 (0.7520).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import IMAGENET_224, K, batch_name, goyal_steps, recipe, scaled, top1

EXPECTED = {
    256: top1(0.764, is_approximate=True),
    512: None,
    1 * K: None,
    2 * K: None,
    4 * K: None,
    8 * K: top1(0.763),
    16 * K: top1(0.752, is_approximate=True),
    32 * K: top1(0.725, is_approximate=True),
}


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for batch, expected in EXPECTED.items():
        notes = ""
        if expected is None:
            notes = "; read from a figure only, close to those of 256 and 8192"
        elif batch > 8 * K:
            notes = "; beyond the batch to which the rule holds"
        yield (
            f"resnet50_imagenet_sgd_{batch_name(batch)}",
            recipe(
                model="resnet50",
                model_options={"classifier_std": 0.01},
                **IMAGENET_224,
                augmentation="inception",
                batch_norm={"ghost_batch_size": 32},
                no_weight_decay=["norm"],
                batch=batch,
                epochs=90,
                lr_scaling=scaled("linear", 0.1, 256),
                optimizer="SGD",
                params={"lr": "auto", "momentum": 0.9, "nesterov": True, "weight_decay": 0.0001},
                scheduler=goyal_steps(batch),
                source=f"arXiv:1706.02677, section 5 and Figure 1, batch {batch}{notes}",
                expected=expected,
                hardware=f"{batch // 32} P100 (32 images each)" if batch <= 8 * K else "256 P100, with accumulation",
            ),
        )
