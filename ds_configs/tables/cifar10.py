"""DavidNet on CIFAR-10, 24 epochs, triangular learning rate.

At 512: SGD of github.com/davidcpage/cifar10-fast (dawn.py) and LAMB of github.com/fastalgo/davidnet-cifar, whose losses are
sums over the batch; here they are means, so learning rates and decay are those divided by what the sum multiplies them
with, and LAMB's eps is 1e-6 / 512. Larger batches follow the rules of their papers; nobody has published accuracies for
them, and the warm-up is not lengthened (in proportion it would outlast the training).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import BIAS_AND_NORM_OUT, K, batch_name, poly, recipe, scaled, top1

BATCHES = (512, 1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K)

ROWS: dict[str, dict[str, Any]] = {
    "SGD": {
        "params": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.0005},
        "lr_at_512": ("linear", 0.4),
        "warmup_epochs": 5,
        "origin": "github.com/davidcpage/cifar10-fast, dawn.py",
        "figure": "median of 50 runs",
        "expected": top1(0.9408, 0.003),
    },
    "LAMB": {
        "params": {
            "betas": [0.9, 0.999],
            "eps": 2e-9,
            "weight_decay": 1.0,
            "bias_correction": False,
            **BIAS_AND_NORM_OUT,
        },
        "lr_at_512": ("sqrt", 10 / 512),
        "warmup_epochs": 6,
        "origin": "github.com/fastalgo/davidnet-cifar, lamb_correct, learning rate 10, weight decay 1",
        "figure": "mean of 6 runs on 8,000 of the test images; arXiv:1904.00962 has the best of many, about .9408",
        "expected": top1(0.9368),
    },
    "LARS": {
        "params": {"momentum": 0.9, "weight_decay": 0.0005, "trust_coefficient": 0.001, "preset": "mlperf"},
        "lr_at_512": ("sqrt", 4.0),
        "warmup_epochs": 5,
        "origin": "learning rate of ResNet-50 at 512 in github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, not tuned",
        "figure": "no accuracy known",
    },
    "AdamW": {
        "params": {"weight_decay": 0.01, "torch_adam": True},
        "no_weight_decay": ["bias", "norm"],
        "lr_at_512": ("sqrt", 0.004),
        "warmup_epochs": 5,
        "origin": "learning rate chosen here, not tuned",
        "figure": "arXiv:1904.00962 has about .9271 with another",
    },
    "Adam": {
        "params": {"weight_decay": 0.0005, "adam_w_mode": False, "torch_adam": True},
        "no_weight_decay": ["bias", "norm"],
        "lr_at_512": ("sqrt", 0.004),
        "warmup_epochs": 5,
        "origin": "learning rate chosen here, not tuned",
        "figure": "arXiv:1904.00962 has about .9225 with another",
        "batches": BATCHES[:1],
    },
    "Adagrad": {
        "params": {"weight_decay": 0.0005, "initial_accumulator_value": 0.1},
        "no_weight_decay": ["bias", "norm"],
        "lr_at_512": ("sqrt", 0.02),
        "warmup_epochs": 5,
        "origin": "learning rate chosen here, not tuned",
        "figure": "arXiv:1904.00962 has about .9074 with another",
        "batches": BATCHES[:1],
    },
}


NARROW_BATCHES = (512, 2 * K, 8 * K, 32 * K)
NARROW_LR_AT_512 = {"SGD": 0.4, "LAMB": 10 / 512, "LARS": 4.0, "AdamW": 0.012}
NARROW_EPOCHS = 3
"""For a machine without a GPU: an eighth of the width and of the length. How the rates were chosen: docs/results/cifar10.md."""


def narrow_recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for optimizer, lr_at_512 in NARROW_LR_AT_512.items():
        row = ROWS[optimizer]
        rule, _ = row["lr_at_512"]
        for batch in NARROW_BATCHES:
            yield (
                f"davidnet_cifar10_{optimizer.lower()}_{batch_name(batch)}_narrow",
                recipe(
                    model="davidnet",
                    model_options={"width": 8},
                    data="cifar10",
                    augmentation="davidnet",
                    batch_norm={"ghost_batch_size": 512, "momentum": 0.5},
                    **{key: row[key] for key in ("no_weight_decay",) if key in row},
                    batch=batch,
                    epochs=NARROW_EPOCHS,
                    lr_scaling=scaled(rule, lr_at_512, 512),
                    optimizer=optimizer,
                    params={"lr": "auto", **row["params"]},
                    scheduler=poly(row["warmup_epochs"] * NARROW_EPOCHS / 24, power=1),
                    source=f"the recipe of width 64 and 24 epochs, narrow and short; results in docs/results/cifar10.md; {rule} rule "
                    "from 512",
                    expected=None,
                    hardware="two CPU cores",
                ),
            )


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from narrow_recipes()
    for optimizer, row in ROWS.items():
        rule, lr_at_512 = row["lr_at_512"]
        for batch in row.get("batches", BATCHES):
            is_source = batch == 512
            yield (
                f"davidnet_cifar10_{optimizer.lower()}_{batch_name(batch)}",
                recipe(
                    model="davidnet",
                    data="cifar10",
                    augmentation="davidnet",
                    batch_norm={"ghost_batch_size": 512},
                    **{key: row[key] for key in ("no_weight_decay",) if key in row},
                    batch=batch,
                    epochs=24,
                    lr_scaling=scaled(rule, lr_at_512, 512),
                    optimizer=optimizer,
                    params={"lr": "auto", **row["params"]},
                    scheduler=poly(row["warmup_epochs"], power=1),
                    source=f"{row['origin']}: {row['figure']}"
                    if is_source
                    else f"{row['origin']}; scaled from 512 by the {rule} rule, no accuracy known",
                    expected=row.get("expected") if is_source else None,
                    hardware="one GPU",
                ),
            )
