"""MLPerf training, BERT-large with LAMB: the reference convergence points (mlcommons/logging, rcps_bert.json).

One phase with sequences of 512 tokens that begins from a checkpoint of MLPerf's own, which does not come with the recipes:
a run here begins from random weights, so that MLPerf's target, a masked-token accuracy of 0.72, is not expected of it. The larger the batch, the smaller the betas. eps 1e-6, gradients clipped at a global norm of 1.

Where the table leaves something open: no warm-up; weight decay 0.01; as many steps as the mean number of samples to the
target takes, which is then what the linear decay runs over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from largebatch.ds_configs.tables.entries import BIAS_AND_NORM_OUT, batch_name, recipe

ROWS = (
    (256, 3.5e-4, (0.9, 0.999), 0.01, 0, 13700, 2.55),
    (448, 4.25e-4, (0.9, 0.999), 0.01, None, None, 2.41),
    (1536, 0.002, (0.66, 0.996), 0.01, None, None, 2.78),
    (3072, 0.002, (0.66, 0.998), 0.01, 100, None, 2.77),
    (4096, 0.0024, (0.66, 0.998), 0.01, None, None, 2.84),
    (6144, 0.0029293, (0.7206, 0.78921), 0.001, None, None, 3.32),
    (8192, 0.00288293, (0.88, 0.88), 0.0166629, 287, 600, 4.19),
    (12288, 0.0031, (0.8, 0.925), None, None, None, 4.47),
    (16384, 0.0033, (0.75, 0.9), None, None, None, 5.50),
)
"""Batch, learning rate, betas, weight decay, warm-up steps, steps, mean millions of samples to 0.72; None: not given."""


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for batch, lr, betas, weight_decay, num_warmup_steps, num_steps, millions in ROWS:
        given = {"weight decay": weight_decay, "warm-up": num_warmup_steps, "length": num_steps}
        missing = [name for name, value in given.items() if value is None]
        warmup = {"warmup_steps": num_warmup_steps} if num_warmup_steps else {}
        yield (
            f"bert_text_lamb_{batch_name(batch)}_mlperf",
            recipe(
                model="bert",
                model_options={"preset": "bert-large"},
                data="text",
                data_options={"vocab_size": 30522, "documents": "blank_lines", "sequence_length": 512},
                steps=num_steps or round(1e6 * millions / batch),
                batch=batch,
                optimizer="LAMB",
                params={
                    "lr": lr,
                    "betas": list(betas),
                    "eps": 1e-6,
                    "weight_decay": 0.01 if weight_decay is None else weight_decay,
                    **BIAS_AND_NORM_OUT,
                },
                scheduler={"type": "WarmupPolyLR", "total_steps": "auto", **warmup, "power": 1},
                gradient_clipping=1.0,
                source=f"MLPerf training, rcps_bert.json, batch {batch}: 0.72 after {millions}M samples in the mean, from MLPerf's "
                f"checkpoint{'; not given: ' + ', '.join(missing) if missing else ''}",
                expected=None,
                hardware="not given",
            ),
        )
