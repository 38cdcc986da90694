"""What the planner's probe runs: a recipe's model, and the loss of made-up samples of its task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.launch.data.options import filled_options
from largebatch.models.auxiliary import loss_with_auxiliaries
from largebatch.models.catalogue import TEXT_BUILDERS, build_model
from largebatch.planning.activations import Loss

IMAGES = {"digits": ((1, 8, 8), 10), "mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10)}
"""Data set -> image shape, number of classes."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_and_loss(section: dict[str, Any], precision: str, device: str) -> tuple[nn.Module, Loss]:
    """The model in the compute type on the device, and the loss for the probe.

    Args:
        section: "largebatch" of a recipe, checked.

    Raises:
        ValueError, TypeError: the model cannot be built for the data.
    """
    build = text if section["data"] == "text" else images
    model, loss = build(section, DTYPES[precision], device)
    return model.to(device, DTYPES[precision]).train(), loss


def images(section: dict[str, Any], dtype: torch.dtype, device: str) -> tuple[nn.Module, Loss]:
    shape, num_classes = image_shape(section)
    model = build_model(section["model"], image_shape=shape, num_classes=num_classes, options=section["model_options"])

    def loss(model: nn.Module, micro_batch: int) -> Tensor:
        inputs = torch.randn(micro_batch, *shape, device=device).to(dtype, memory_format=torch.channels_last)
        labels = torch.randint(num_classes, (micro_batch,), device=device)
        return loss_with_auxiliaries(model(inputs), lambda logits: F.cross_entropy(logits, labels))

    return model, loss


def image_shape(section: dict[str, Any]) -> tuple[tuple[int, int, int], int]:
    """(channels, height, width) and the number of classes."""
    data = section["data"]
    if data in IMAGES:
        return IMAGES[data]
    options = filled_options(data, section["data_options"])
    if data == "imagenet":
        return (3, options["image_size"], options["image_size"]), 1000
    return tuple(options["image_shape"]), options["num_classes"]


def text(section: dict[str, Any], dtype: torch.dtype, device: str) -> tuple[nn.Module, Loss]:
    from largebatch.launch.data.sentence_pairs import NUM_SPECIAL, PairBatch
    from largebatch.launch.data.text import TextOptions
    from largebatch.launch.trainer.pretraining import losses_of

    options = TextOptions.of(section["data_options"])
    length, vocab_size = options.sequence_length, options.vocab_size
    num_masked = max(1, round((length - NUM_SPECIAL) * options.mask_probability))
    model = TEXT_BUILDERS[section["model"]](vocab_size=vocab_size, sequence_length=length, **section["model_options"])

    def loss(model: nn.Module, micro_batch: int) -> Tensor:
        batch = PairBatch(
            tokens=torch.randint(vocab_size, (micro_batch, length)),
            segments=torch.randint(2, (micro_batch, length)),
            attention_mask=torch.ones(micro_batch, length, dtype=torch.int64),
            masked_positions=torch.randint(length, (micro_batch, num_masked)),
            masked_tokens=torch.randint(vocab_size, (micro_batch, num_masked)),
            masked_weights=torch.full((micro_batch, num_masked), 1 / num_masked),
            is_random=torch.randint(2, (micro_batch,)),
        ).to(torch.device(device))
        return sum(losses_of(model, batch)).mean()

    return model, loss
