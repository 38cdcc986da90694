"""Samples of BERT's pre-training: pairs of sentence runs with masked tokens.

Source: arXiv:1810.04805, section 3.1 and appendix A.1, and create_pretraining_data.py of github.com/google-research/bert.
[CLS] A [SEP] B [SEP]: A is a run of sentences, B the run that follows it or, half of the time, one from anywhere else. Of the
tokens, 15% are to be predicted: 80% of these show [MASK], 10% a random token, 10% themselves.

Deviations: A starts at fixed places, so that an epoch covers the text once; masks and pairs are drawn anew for each sample of
training instead of ten times beforehand, as a function of (seed, sample number) alone; a random B comes from any place of
the corpus that does not follow A, instead of from another document.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.launch.data.text import Sentences, TextOptions
from largebatch.launch.data.transfers import uploaded
from largebatch.launch.data.wordpiece import SPECIAL_TOKENS, Vocabulary

NUM_SPECIAL = 3
"""[CLS], [SEP], [SEP]."""


class PairBatch(NamedTuple):
    """A micro-batch of sentence pairs.

    Attributes:
        tokens, segments: [batch, length] int64.
        attention_mask: [batch, length] int64, 0 for padding; None where there is none.
        masked_positions, masked_tokens: [batch, num_masked] int64, where to predict and what was there.
        masked_weights: [batch, num_masked] fp32, which sum up to 1 for each sample; 0 for places that are not used.
        is_random: [batch] int64, 1 where B does not follow A.
    """

    tokens: Tensor
    segments: Tensor
    attention_mask: Tensor | None
    masked_positions: Tensor
    masked_tokens: Tensor
    masked_weights: Tensor
    is_random: Tensor

    def without_idle_mask(self) -> PairBatch:
        """With no mask if it hides nothing. Asked on the host: the network would ask the device, and wait for the answer."""
        is_idle = self.attention_mask is not None and bool(self.attention_mask.all())
        return self._replace(attention_mask=None) if is_idle else self

    def pinned(self) -> PairBatch:
        return PairBatch(*(None if t is None else t.pin_memory() for t in self))

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(*(None if t is None else uploaded(t, device) for t in self))


class SentencePairs:
    """The samples that a text makes.

    Args:
        sentences: training or test text.
    """

    def __init__(self, sentences: Sentences, vocabulary: Vocabulary, options: TextOptions):
        self.sentences, self.options = sentences, options
        self.pad, self.cls, self.sep, self.mask = (vocabulary.id_of(t) for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
        special = {vocabulary.id_of(token) for token in SPECIAL_TOKENS}
        self.ordinary = np.array([i for i in range(len(vocabulary)) if i not in special])
        self.room = options.sequence_length - NUM_SPECIAL
        self.num_masked = self._num_masked(self.room)

    def __len__(self) -> int:
        """How many samples of full length cover the text."""
        return -(-len(self.sentences.tokens) // self.room)

    def _num_masked(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.options.mask_probability))

    def batch(self, indices: list[int], *, seed: int, numbers: list[int]) -> PairBatch:
        """Samples by place in the text, each with the randomness of its number.

        Args:
            indices: 0 to len(self) - 1, where A begins.
            numbers: which sample of training each is.
        """
        size, length = len(indices), self.options.sequence_length
        tokens = np.full((size, length), self.pad)
        segments = np.zeros((size, length), np.int64)
        positions, originals = np.zeros((2, size, self.num_masked), np.int64)
        weights = np.zeros((size, self.num_masked), np.float32)
        is_random = np.zeros(size, np.int64)
        for row, (index, number) in enumerate(zip(indices, numbers, strict=True)):
            random = np.random.Generator(np.random.Philox(key=[seed, number]))
            first, second, is_random[row] = self._pair(index, random)
            text = np.concatenate([[self.cls], first, [self.sep], second, [self.sep]])
            segments[row, len(first) + 2 : len(text)] = 1
            count = self._num_masked(len(text) - NUM_SPECIAL)
            places = np.delete(np.arange(len(text) - 1), [0, len(first) + 1])
            chosen = np.sort(random.choice(places, count, replace=False))
            positions[row, :count], originals[row, :count], weights[row, :count] = chosen, text[chosen], 1 / count
            kind = random.random(count)
            replacements = self.ordinary[random.integers(len(self.ordinary), size=count)]
            text[chosen] = np.where(kind < 0.8, self.mask, np.where(kind < 0.9, replacements, text[chosen]))
            tokens[row, : len(text)] = text
        arrays = (tokens, segments, (tokens != self.pad).astype(np.int64), positions, originals, weights, is_random)
        return PairBatch(*(torch.from_numpy(a) for a in arrays))

    def _pair(self, index: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, bool]:
        """A and B, together at most ``room`` tokens and each at least one, and whether B is from elsewhere."""
        starts = self.sentences.starts
        target = self.room
        if random.random() < self.options.short_sequence_probability:
            target = int(random.integers(2, self.room + 1))
        begin = int(np.searchsorted(starts, index * self.room, side="right")) - 1
        end = self._end_of_run(begin, target)
        border = int(random.integers(begin + 1, end)) if end - begin > 1 else end
        is_random = end - begin == 1 or random.random() < 0.5
        second_begin, second_end = border, end
        if is_random:
            second_begin = int(random.integers(self.sentences.num_sentences - 1))
            second_begin += second_begin >= border  # anywhere but where A ends
            second_end = self._end_of_run(second_begin, target - int(starts[border] - starts[begin]))
        first, second = (
            self.sentences.tokens[starts[a] : starts[b]] for a, b in ((begin, border), (second_begin, second_end))
        )
        # the longer one gives way, at its front or back for each token by chance
        excess = max(0, len(first) + len(second) - target)
        from_longer = min(excess, abs(len(first) - len(second)))
        shared = excess - from_longer
        cuts = [(shared + 1) // 2, shared // 2]
        cuts[len(second) > len(first)] += from_longer
        first, second = (shortened(run, cut, random) for run, cut in zip((first, second), cuts, strict=True))
        return first, second, is_random

    def _end_of_run(self, begin: int, num_tokens: int) -> int:
        """The sentence after the shortest run of at least so many tokens and one sentence inside its document."""
        starts, ends = self.sentences.starts, self.sentences.document_ends
        end = int(np.searchsorted(starts, starts[begin] + max(1, num_tokens), side="left"))
        document_end = int(ends[np.searchsorted(ends, begin, side="right")])
        return min(end, document_end)


def shortened(run: np.ndarray, num_dropped: int, random: np.random.Generator) -> np.ndarray:
    front = int(random.binomial(num_dropped, 0.5))
    return run[front : len(run) - (num_dropped - front)]
