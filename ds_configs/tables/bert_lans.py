"""BERT with LANS, arXiv:2006.13484: the batches 96K and 33K of the paper, and the one that the authors' group published as a script.

Linear warm-up, a phase at the peak, linear decay to zero; no clipping, as the gradients are normalised by layer. Biases and
normalisation layers are adapted and not decayed. Learning rates and phases of the paper's run are given as shares of its steps
(42.65% and 27.35%, 19.2% and 10.8%); they were not read on the page itself. "33K" is taken for 33 x 1,024, which the paper's 1,536
GPUs divide.
The script is dmlc/gluon-nlp, scripts/pretraining/torch/bert: BERT-base, the first phase alone, clipped at 1.
F1 is that of SQuAD v1.1 after fine-tuning, which is not part of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import K, recipe, scaled

PAPER = "arXiv:2006.13484"
LANS = {
    "lr": "auto",
    "betas": [0.9, 0.999],
    "eps": 1e-6,
    "weight_decay": 0.01,
    "exclude_from_weight_decay": ["bias", "norm"],
}


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    phases = [
        phase(batch=96 * K, sequence_length=128, num_steps=3519, lr=0.00675, warmup=0.4265, constant=0.2735),
        phase(batch=33 * K, sequence_length=512, num_steps=782, lr=0.005, warmup=0.192, constant=0.108),
    ]
    yield (
        "bert_text_lans_96k_33k",
        row(
            preset="bert-large",
            phases=phases,
            lr=0.00675,
            clipping=0.0,
            source=f"{PAPER}: 96K/33K, 54 minutes, F1 of 90.5 or higher; learning rates and phases not read on the page itself",
            expected={"metric": "squad_f1", "value": 0.905, "band": 0.005, "is_approximate": True},
            hardware="192 AWS p3dn.24xlarge, 1,536 V100",
        ),
    )
    first = phase(batch=96 * K, sequence_length=128, num_steps=3870, lr=0.005, warmup=0.05, constant=0.25)
    yield (
        "bert_text_lans_96k",
        row(
            preset="bert-base",
            phases=[first],
            lr=0.005,
            clipping=1.0,
            source="dmlc/gluon-nlp, scripts/pretraining/torch/bert/README.md: phase 1, 8 x 128 sequences x 96 accumulated; phase 2 not given",
            expected=None,
            hardware="8 GPUs (AWS p4)",
        ),
    )


def phase(
    *, batch: int, sequence_length: int, num_steps: int, lr: float, warmup: float, constant: float
) -> dict[str, Any]:
    """
    Args:
        warmup, constant: shares of ``num_steps``.
    """
    phases = {"warmup_steps": round(warmup * num_steps), "constant_steps": round(constant * num_steps)}
    return {
        "largebatch": {
            "steps": num_steps,
            "data_options": {"sequence_length": sequence_length},
            "lr_scaling": {"base_lr": lr},
        },
        "train_batch_size": batch,
        "scheduler": {"params": phases},
    }


def row(*, preset: str, phases: list[dict[str, Any]], lr: float, clipping: float, **section: Any) -> dict[str, Any]:
    return recipe(
        model="bert",
        model_options={"preset": preset},
        data="text",
        data_options={"vocab_size": 30522, "documents": "blank_lines"},
        phases=phases,
        lr_scaling=scaled("none", lr, 96 * K),
        batch=96 * K,
        optimizer="LANS",
        params=LANS,
        scheduler={"type": "WarmupPolyLR", "total_steps": "auto", "power": 1},
        gradient_clipping=clipping,
        **section,
    )
