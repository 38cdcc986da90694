"""LAMB on ResNet-50, arXiv:1904.00962, and the optimizers that it is compared with at batch 16K.

The rule: learning rate by the square root of the batch, warm-up epochs in proportion to it, all else constant. What the
paper leaves out (weight decay 1.5, label smoothing, clipping, normalisation layers left alone) is that of the authors'
code, github.com/fastalgo/imagenet_resnet50_lamb. Ghost batch sizes of batch normalisation: 128 images a TPU core in their run; the
paper's table gives none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import IMAGENET_224, K, batch_name, goyal_steps, poly, recipe, scaled, top1

PAPER = "arXiv:1904.00962"
RESNET50 = {"model": "resnet50", "model_options": {"classifier_std": 0.01}, **IMAGENET_224, "augmentation": "inception"}
LAMB = {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 1.5}
LR_SCALING = scaled("sqrt", 0.04, 32 * K)
HARDWARE = "128 TPUv3 chips"

TOP1 = {512: 0.7696, 1 * K: 0.7706, 2 * K: 0.7711, 4 * K: 0.7692, 8 * K: 0.7689, 16 * K: 0.7666, 32 * K: 0.7642}

AT_16K = (
    (
        "Adam",
        {"lr": 0.004, "weight_decay": 0.0002, "adam_w_mode": False, "torch_adam": True},
        "appendix, tuning of AdamW: decoupled decay off, L2 0.0002",
        top1(0.7307, is_approximate=True),
    ),
    (
        "AdamW",
        {"lr": 0.004, "weight_decay": 0.01, "torch_adam": True},
        "appendix, tuning of AdamW: its learning rate, with decoupled decay; no accuracy known",
        None,
    ),
    (
        "Adagrad",
        {"lr": 0.01, "weight_decay": 0.0001, "initial_accumulator_value": 0.1},
        "comparison of optimizers at 16K; the learning rate is not known, this one is a guess and not tuned",
        None,
    ),
)
"""Optimizer, params, row, expected."""


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for batch, accuracy in TOP1.items():
        yield (
            f"resnet50_imagenet_lamb_{batch_name(batch)}",
            recipe(
                **RESNET50,
                label_smoothing=0.1,
                batch_norm={"ghost_batch_size": 64},
                batch=batch,
                epochs=90,
                lr_scaling=LR_SCALING,
                optimizer="LAMB",
                params=LAMB | {"exclude_from_adaptation": ["norm"], "exclude_from_weight_decay": ["norm"]},
                scheduler=poly(20 * batch / (32 * K), power=1),
                gradient_clipping=1.0,
                source=f"{PAPER}, table of untuned LAMB on ResNet-50, batch {batch}",
                expected=top1(accuracy, is_approximate=True),
                hardware=HARDWARE,
            ),
        )
    yield (
        "resnet50_imagenet_lamb_32k_author",
        recipe(
            **RESNET50,
            label_smoothing=0.1,
            batch_norm={"ghost_batch_size": 128},
            batch=32 * K,
            steps=3519,
            lr_scaling=LR_SCALING,
            optimizer="LAMB",
            params=LAMB | {"preset": "author", "max_grad_norm": None},
            scheduler={"type": "WarmupPolyLR", "total_steps": "auto", "warmup_steps": 782, "power": 1},
            gradient_clipping=1.0,
            source="github.com/fastalgo/imagenet_resnet50_lamb, run.sh and its log (one run; top-5 0.9302)",
            expected=top1(0.7634, 0.003),
            hardware=HARDWARE,
        ),
    )
    for optimizer, params, source, expected in AT_16K:
        yield (
            f"resnet50_imagenet_{optimizer.lower()}_16k",
            recipe(
                **RESNET50,
                batch_norm={"ghost_batch_size": 64},
                no_weight_decay=["bias", "norm"],
                batch=16 * K,
                epochs=90,
                optimizer=optimizer,
                params=params,
                scheduler=goyal_steps(16 * K),
                source=f"{PAPER}, {source}",
                expected=expected,
                hardware=HARDWARE,
            ),
        )
