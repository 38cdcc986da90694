"""Published settings of self-supervised training on ImageNet with LARS: plain ds_configs for a DeepSpeed script of one's own.

Learning rates are the codes' rules at their batch: per 256 samples, or by the square root. Lengths in epochs of 1,281,167
images, the last incomplete batch dropped. What a batch of the loss is (see docs/self_supervised.md) is the script's affair: there is no
micro-batch here, so that DeepSpeed takes a rank's share of the batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NUM_IMAGES = 1_281_167
NUM_WARMUP_EPOCHS = 10


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        lr: at the batch.
        warmup_start_factor, end_factor: shares of the peak.
    """

    preset: str
    batch: int
    lr: float
    weight_decay: float
    num_epochs: int
    warmup_start_factor: float = 0.0
    end_factor: float = 0.0
    name: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.name or self.preset}_{self.batch}"


def per_256(lr: float, batch: int) -> float:
    return lr * batch / 256


ROWS = (
    Row("simclr", 4096, per_256(0.3, 4096), 1e-6, 100),
    Row("byol", 4096, per_256(0.2, 4096), 1.5e-6, 1000),
    Row("barlow_twins", 2048, per_256(0.2, 2048), 1e-6, 1000, end_factor=0.001),
    Row("vicreg", 2048, per_256(0.2, 2048), 1e-6, 1000, end_factor=0.001),
    Row("moco_v3", 4096, per_256(0.3, 4096), 1.5e-6, 1000),
    Row("mae_linear_probe", 16384, per_256(0.1, 16384), 0.0, 90),
    Row("swav", 4096, 4.8, 1e-6, 800, warmup_start_factor=0.0625, end_factor=0.001),
    Row("lightly", 256, 0.075 * math.sqrt(256), 1e-6, 100, name="lightly_simclr"),
)


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """(File name without .json, ds_config)"""
    for row in ROWS:
        params: dict[str, Any] = {
            "total_epochs": row.num_epochs,
            "warmup_epochs": NUM_WARMUP_EPOCHS,
            "steps_per_epoch": NUM_IMAGES // row.batch,
        }
        for name in ("warmup_start_factor", "end_factor"):
            if getattr(row, name):
                params[name] = getattr(row, name)
        optimizer = {"preset": row.preset, "lr": row.lr, "momentum": 0.9, "weight_decay": row.weight_decay}
        yield (
            row.file_name,
            {
                "train_batch_size": row.batch,
                "optimizer": {"type": "LARS", "params": optimizer},
                "scheduler": {"type": "WarmupCosineDecayLR", "params": params},
                "gradient_clipping": 0.0,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 1},
            },
        )
