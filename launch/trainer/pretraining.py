"""The task of BERT's pre-training: predict masked tokens, and whether one run of sentences follows another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.config import nearest_hint
from largebatch.launch.data.sample_order import SampleOrder, micro_batch_ranges
from largebatch.launch.data.sentence_pairs import PairBatch, SentencePairs
from largebatch.launch.data.text import TextOptions, load_text
from largebatch.launch.data.transfers import uploaded
from largebatch.models.catalogue import TEXT_BUILDERS, check_model

EVALUATION_BATCH = 64
BATCHES_AHEAD = 4
WITHOUT_EFFECT = {"augmentation": "none", "mixup": 0.0, "label_smoothing": 0.0, "batch_norm": {}}


class Pretraining:
    """BERT on a text corpus; see largebatch.launch.trainer.task.Task.

    The loss is the cross-entropy of the masked tokens, averaged within each sample and then over the samples, plus that of
    the pair. BERT's code averages over the masked tokens of the micro-batch: the same for samples of full length, but
    otherwise the gradient of a global batch would depend on the micro-batch.

    Raises:
        ValueError, TypeError: naming the entry of the recipe, its value and what is allowed.
        RuntimeError: transformers is not installed.
    """

    sample_name = "sequences"
    unreadable: dict[str, str] = {}

    def __init__(self, section: dict[str, Any], folder: str | None):
        self.section = section
        if section["model"] not in TEXT_BUILDERS:
            raise ValueError(
                f'largebatch.model is {section["model"]!r} with largebatch.data "text"; expected one of '
                f"{', '.join(map(repr, TEXT_BUILDERS))}{nearest_hint(section['model'], list(TEXT_BUILDERS))}"
            )
        check_model(section["model"], section["model_options"])
        for name, neutral in WITHOUT_EFFECT.items():
            if section[name] != neutral:
                raise ValueError(f"largebatch.{name} is {section[name]!r}, which has no effect on text; leave it out")
        options = TextOptions.of(section["data_options"])
        self.corpus = load_text(folder, options)
        self.sequence_length = options.sequence_length
        self.train = SentencePairs(self.corpus.train, self.corpus.vocabulary, options)
        self.test = SentencePairs(self.corpus.test, self.corpus.vocabulary, options)
        self.num_samples = len(self.train)
        self.description = (
            f"text ({self.num_samples} sequences of {self.sequence_length} tokens, vocabulary of "
            f"{len(self.corpus.vocabulary)})"
        )

    def build_model(self) -> nn.Module:
        return TEXT_BUILDERS[self.section["model"]](
            vocab_size=len(self.corpus.vocabulary),
            sequence_length=self.sequence_length,
            **self.section["model_options"],
        )

    def micro_batches(self, *, seed: int, device: torch.device, **layout: int) -> Iterator[PairBatch]:
        """Made by a thread, a few ahead of training.

        Args:
            layout: of the global batch, as micro_batch_ranges takes it.
        """
        check_same_on_all_ranks(self.corpus.digest, layout["rank"], layout["world_size"], device)
        order = SampleOrder(self.num_samples, seed)
        ranges = micro_batch_ranges(**layout)

        def make(numbers: range) -> PairBatch:
            indices = order.indices(numbers.start, numbers.stop).tolist()
            batch = self.train.batch(indices, seed=seed, numbers=list(numbers)).without_idle_mask()
            return batch.pinned() if device.type == "cuda" else batch

        with ThreadPoolExecutor(max_workers=1) as pool:
            pending = deque(pool.submit(make, next(ranges)) for _ in range(BATCHES_AHEAD))
            while True:
                pending.append(pool.submit(make, next(ranges)))
                yield pending.popleft().result().to(device)

    def loss(self, model: nn.Module, batch: PairBatch, *, dtype: torch.dtype) -> Tensor:
        mlm_losses, nsp_losses = losses_of(model, batch)
        return (mlm_losses + nsp_losses).mean()

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, *, dtype: torch.dtype, rank: int, world_size: int, device: torch.device
    ) -> dict[str, float]:
        """{"mlm_accuracy", "nsp_accuracy", "mlm_loss", "nsp_loss", "test_loss"}.

        The test samples and their masks are the same whatever the seed: accuracies are shares of the masked tokens and of the
        pairs, losses means over the samples, and test_loss the training's.
        """
        was_training = model.training
        model.eval()
        sums = torch.zeros(6, dtype=torch.float64, device=device)
        for numbers, are_counted in evaluation_batches(len(self.test), rank, world_size):
            batch = self.test.batch(numbers, seed=0, numbers=numbers).without_idle_mask().to(device)
            counted = uploaded(torch.tensor(are_counted, dtype=torch.float64), device)
            mlm_logits, nsp_logits = forward(model, batch)
            used = (batch.masked_weights > 0) * counted.unsqueeze(1)
            mlm_losses, nsp_losses = losses_from(mlm_logits, nsp_logits, batch)
            sums += torch.stack(
                [
                    ((mlm_logits.argmax(2) == batch.masked_tokens) * used).sum(),
                    used.sum(),
                    ((nsp_logits.argmax(1) == batch.is_random) * counted).sum(),
                    (mlm_losses * counted).sum(),
                    (nsp_losses * counted).sum(),
                    counted.sum(),
                ]
            )
        if world_size > 1:
            dist.all_reduce(sums)
        model.train(was_training)
        correct, num_masked, correct_pairs, mlm_loss, nsp_loss, num_samples = sums.tolist()
        assert num_samples == len(self.test)
        return {
            "mlm_accuracy": correct / num_masked,
            "nsp_accuracy": correct_pairs / num_samples,
            "mlm_loss": mlm_loss / num_samples,
            "nsp_loss": nsp_loss / num_samples,
            "test_loss": (mlm_loss + nsp_loss) / num_samples,
        }

    def summary(self, metrics: dict[str, float]) -> str:
        return (
            f"test accuracy: masked tokens {metrics['mlm_accuracy']:.4f}, next sentence {metrics['nsp_accuracy']:.4f}; loss "
            f"{metrics['test_loss']:.4f}"
        )


def forward(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """fp32 logits of the masked tokens [batch, num_masked, vocab_size] and of the pairs [batch, 2]."""
    mlm_logits, nsp_logits = model(batch.tokens, batch.segments, batch.attention_mask, batch.masked_positions)
    return mlm_logits.float(), nsp_logits.float()


def losses_from(mlm_logits: Tensor, nsp_logits: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """[batch] fp32 each: of the masked tokens of a sample, and of its pair."""
    per_token = F.cross_entropy(mlm_logits.flatten(0, 1), batch.masked_tokens.flatten(), reduction="none")
    mlm_losses = (per_token.view_as(batch.masked_weights) * batch.masked_weights).sum(1)
    return mlm_losses, F.cross_entropy(nsp_logits, batch.is_random, reduction="none")


def losses_of(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    return losses_from(*forward(model, batch), batch)


def evaluation_batches(num_samples: int, rank: int, world_size: int) -> Iterator[tuple[list[int], list[bool]]]:
    """This rank's test samples, and which of them count.

    Every rank gets as many batches: under ZeRO 3 a forward is a collective.
    """
    per_rank = -(-num_samples // world_size)
    for start in range(0, per_rank, EVALUATION_BATCH):
        numbers = [rank + i * world_size for i in range(start, min(start + EVALUATION_BATCH, per_rank))]
        yield [min(n, num_samples - 1) for n in numbers], [n < num_samples for n in numbers]


def check_same_on_all_ranks(digest: str, rank: int, world_size: int, device: torch.device) -> None:
    """Refuses ranks that have read different text, as on two machines with different copies of a folder. A collective.

    Raises:
        RuntimeError: on every rank whose corpus is not that of rank 0.
    """
    if world_size == 1:
        return
    mine = torch.tensor(int(digest[:15], 16), device=device)
    first = mine.clone()
    dist.broadcast(first, src=0)
    differs = torch.tensor(float(mine != first), device=device)
    num_differing = differs.clone()
    dist.all_reduce(num_differing)
    if num_differing.item():
        whose = (
            "this rank's text or vocabulary is not" if differs.item() else f"{num_differing.item():.0f} ranks have not"
        )
        raise RuntimeError(
            f"rank {rank} of {world_size}: {whose} that of rank 0; give --data the same files on every machine"
        )
