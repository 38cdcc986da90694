"""BERT-large with LAMB, arXiv:1904.00962: batches 512 to 32K, and 64K/32K mixed.

Nine tenths of the steps have sequences of 128 tokens, the last tenth of 512. Learning rate by the square root of the batch,
3,125 warm-up steps at every batch (1/320 of a million, 1/5 of 15,625), then eta_0 (1 - t/T), which goes on through both
phases. With mixed batches the second phase warms up anew; the paper's learning rates and warm-ups of that run are not known
here, so they follow the rule, with a fifth of the second phase for its warm-up.
F1 is that of SQuAD v1.1 after fine-tuning, which is not part of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import BIAS_AND_NORM_OUT, K, batch_name, recipe, scaled

PAPER = "arXiv:1904.00962"
NUM_STEPS = {
    512: 1_000_000,
    1 * K: 500_000,
    2 * K: 250_000,
    4 * K: 125_000,
    8 * K: 62_500,
    16 * K: 31_250,
    32 * K: 15_625,
}
F1 = {512: 0.91752, 1 * K: 0.91761, 2 * K: 0.91946, 4 * K: 0.91137, 8 * K: 0.91263, 16 * K: 0.91345, 32 * K: 0.91475}
LR, LR_BATCH = 0.005, 32 * K
NUM_WARMUP_STEPS = 3125

LAMB = {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01, **BIAS_AND_NORM_OUT}


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for batch, num_steps in NUM_STEPS.items():
        num_long = num_steps // 10
        phases = [
            {
                "largebatch": {"steps": num_steps - num_long, "data_options": {"sequence_length": 128}},
                "scheduler": {"params": {"total_steps": num_steps, "warmup_steps": NUM_WARMUP_STEPS}},
            },
            {
                "largebatch": {
                    "steps": num_long,
                    "data_options": {"sequence_length": 512},
                    "lr_scaling": {"base_lr": LR * num_long / num_steps},
                }
            },
        ]
        source = f"{PAPER}, tables of BERT with LAMB, batch {batch}; warm-up and learning rate as tabled there"
        yield f"bert_text_lamb_{batch_name(batch)}", row(batch, phases, source, F1[batch])
    phases = [
        {
            "largebatch": {"steps": 7037, "data_options": {"sequence_length": 128}},
            "train_batch_size": 64 * K,
            "scheduler": {"params": {"warmup_steps": NUM_WARMUP_STEPS}},
        },
        {
            "largebatch": {"steps": 1562, "data_options": {"sequence_length": 512}},
            "train_batch_size": 32 * K,
            "scheduler": {"params": {"warmup_steps": 312}},
        },
    ]
    source = (
        f"{PAPER}, table of BERT with LAMB, 64K/32K: 8,599 steps in 76 minutes; learning rates and warm-ups by the rule"
    )
    yield "bert_text_lamb_64k_32k", row(64 * K, phases, source, 0.90584)


def row(batch: int, phases: list[dict[str, Any]], source: str, f1: float) -> dict[str, Any]:
    return recipe(
        model="bert",
        model_options={"preset": "bert-large"},
        data="text",
        data_options={"vocab_size": 30522, "documents": "blank_lines"},
        phases=phases,
        lr_scaling=scaled("sqrt", LR, LR_BATCH),
        batch=batch,
        optimizer="LAMB",
        params=LAMB,
        scheduler={"type": "WarmupPolyLR", "total_steps": "auto", "power": 1, "decay_from": "start"},
        gradient_clipping=1.0,
        source=source,
        expected={"metric": "squad_f1", "value": f1, "band": 0.005, "is_approximate": True},
        hardware="TPUv3; 1,024 chips for 64K/32K",
    )
