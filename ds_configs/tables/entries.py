"""What the tables are written with: a ds_config from its entries, and the entries that many rows share."""

from __future__ import annotations

from typing import Any

K = 1024

SECTION_ORDER = (
    "model", "model_options", "data", "data_options", "augmentation", "mixup", "label_smoothing", "batch_norm",
    "no_weight_decay", "epochs", "steps", "phases", "evaluate_every_epochs", "lr_scaling", "source", "expected", "hardware",
)  # fmt: skip
"""Keys of the "largebatch" section as they follow each other in a file."""

IMAGENET_224 = {"data": "imagenet", "data_options": {"image_size": 224, "resize_size": 256}}
IMAGENET_227 = {"data": "imagenet", "data_options": {"image_size": 227, "resize_size": 256}}
BIAS_AND_NORM_OUT = {
    "exclude_from_adaptation": ["bias", "norm"],
    "exclude_from_weight_decay": ["bias", "norm"],
}


def recipe(
    *,
    batch: int,
    optimizer: str,
    params: dict[str, Any],
    scheduler: dict[str, Any],
    gradient_clipping: float = 0.0,
    **section: Any,
) -> dict[str, Any]:
    """A ds_config with its keys in the order of the files: bf16 with fp32 masters, ZeRO stage 1.

    Args:
        batch: the global batch.
        scheduler: its type and params in one.
        gradient_clipping: bound of the gradients' norm, 0 for none. Always written: DeepSpeed's default is 1.
        section: of the "largebatch" section.
    """
    unknown = set(section) - set(SECTION_ORDER)
    assert not unknown, f"{unknown} are not in SECTION_ORDER"
    return {
        "largebatch": {key: section[key] for key in SECTION_ORDER if key in section},
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": optimizer, "params": params},
        "scheduler": {"type": scheduler["type"], "params": {k: v for k, v in scheduler.items() if k != "type"}},
        "gradient_clipping": gradient_clipping,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }


def batch_name(batch: int) -> str:
    """512 -> "512", 32768 -> "32k", 58880 -> "58880"."""
    return f"{batch // K}k" if batch % K == 0 else str(batch)


def top1(value: float, band: float = 0.005, *, is_approximate: bool = False) -> dict[str, Any]:
    """An expected accuracy. The default band is for sources that give no spread.

    Args:
        is_approximate: the figure was not read on its page, or the model or data are not quite the source's.
    """
    return {"metric": "top1", "value": value, "band": band, "is_approximate": is_approximate}


def poly(warmup_epochs: float, power: int = 2, **params: Any) -> dict[str, Any]:
    """Linear warm-up and polynomial decay over the whole training."""
    warmup = {"warmup_epochs": warmup_epochs, "steps_per_epoch": "auto"} if warmup_epochs else {}
    return {"type": "WarmupPolyLR", "total_steps": "auto", **warmup, "power": power, **params}


def goyal_steps(batch: int) -> dict[str, Any]:
    """x0.1 at epochs 30, 60 and 80, after five epochs from the learning rate of batch 256 (arXiv:1706.02677, 2.2 and 5.1)."""
    return {
        "type": "WarmupStepLR",
        "milestone_epochs": [30, 60, 80],
        "warmup_epochs": 5,
        "warmup_start_factor": 256 / batch,
        "steps_per_epoch": "auto",
        "gamma": 0.1,
    }


def scaled(rule: str, base_lr: float, base_batch: int) -> dict[str, Any]:
    return {"rule": rule, "base_lr": base_lr, "base_batch": base_batch}
