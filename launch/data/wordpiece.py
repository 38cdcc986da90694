"""Wordpiece vocabularies: trained on a text, always the same for the same text, or read from a vocab.txt."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from largebatch.models.bert import INSTALL

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LARGEST_ALPHABET = 1000
"""Rarer characters become [UNK], as in BERT's own vocabulary training."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how text becomes ids: cleaned, split at white space and punctuation, then into wordpieces.

    Attributes:
        tokens: all distinct, the special ones among them; "##" begins a piece that continues a word.
        is_lowercased: whether text is lower-cased and stripped of accents first (BERT "uncased").
    """

    tokens: tuple[str, ...]
    is_lowercased: bool = True

    def __len__(self) -> int:
        return len(self.tokens)

    def id_of(self, token: str) -> int:
        return self.tokens.index(token)

    @property
    def digest(self) -> str:
        """The same for the same vocabulary."""
        return hashlib.sha256("\n".join((*self.tokens, str(self.is_lowercased))).encode()).hexdigest()

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizers = import_tokenizers()
        model = tokenizers.models.WordPiece({t: i for i, t in enumerate(self.tokens)}, unk_token="[UNK]")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = text_splitters(self.is_lowercased)
        return tokenizer

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All sentences' ids one after another, int32, without special tokens, and how many each has, int64."""
        ids = [e.ids for e in self._tokenizer.encode_batch_fast(list(sentences), add_special_tokens=False)]
        lengths = np.array([len(i) for i in ids], dtype=np.int64)
        return np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum()), lengths

    def save(self, path: str) -> None:
        """One token a line, as BERT's vocab.txt."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{token}\n" for token in self.tokens)


def import_tokenizers() -> Any:
    """The optional dependency.

    Raises:
        RuntimeError: it is not installed; says how to install it.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(f"text data needs the package tokenizers ({error}); install it: {INSTALL}") from None
    return tokenizers


def text_splitters(is_lowercased: bool) -> tuple[Any, Any]:
    tokenizers = import_tokenizers()
    return tokenizers.normalizers.BertNormalizer(lowercase=is_lowercased), tokenizers.pre_tokenizers.BertPreTokenizer()


def train_vocabulary(sentences: Iterable[str], *, vocab_size: int, is_lowercased: bool = True) -> Vocabulary:
    """A wordpiece vocabulary by the tokenizers library's trainer (byte-pair merges by frequency).

    The library numbers the pieces of single characters in the order of a hash table, and breaks ties between merges by number:
    another vocabulary in each process. Here they are numbered beforehand, in sorted order.

    Args:
        vocab_size: tokens, at most; a short text may not have as many.

    Raises:
        ValueError: the vocabulary is too small for the characters of the text.
    """
    tokenizers = import_tokenizers()
    normalizer, splitter = text_splitters(is_lowercased)
    words = Counter[str]()
    for sentence in sentences:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)))
    characters = Counter[str]()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    alphabet = sorted(sorted(characters, key=lambda c: (-characters[c], c))[:LARGEST_ALPHABET])
    continuing = sorted({character for word in words for character in word[1:]} & set(alphabet))
    fixed = [*SPECIAL_TOKENS, *(f"##{character}" for character in continuing)]
    num_fixed = len(fixed) + len(alphabet)
    if vocab_size < num_fixed:
        raise ValueError(
            f"largebatch.data_options.vocab_size is {vocab_size}; expected at least {num_fixed}: this text has {len(alphabet)} "
            f"characters, {len(continuing)} of which also continue words, and there are {len(SPECIAL_TOKENS)} special tokens"
        )
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(repeated(words), trainer)
    ids = tokenizer.get_vocab()
    return Vocabulary(tuple(sorted(ids, key=ids.__getitem__)), is_lowercased)


def repeated(words: Counter[str], words_per_line: int = 1000) -> Iterable[str]:
    """Lines that hold each word as often as it was counted."""
    for word, count in sorted(words.items()):
        for start in range(0, count, words_per_line):
            yield " ".join([word] * min(words_per_line, count - start))


def read_vocabulary(path: str, is_lowercased: bool = True) -> Vocabulary:
    """A vocabulary from a vocab.txt, such as that of a published BERT.

    Raises:
        ValueError: it cannot be read, lacks a special token, or holds a token twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tokens = tuple(line.rstrip("\n") for line in file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"largebatch.data_options.vocabulary {path!r} cannot be read: {error}") from None
    missing = [t for t in SPECIAL_TOKENS if t not in tokens]
    if missing:
        raise ValueError(
            f"largebatch.data_options.vocabulary {path!r} lacks {', '.join(missing)}; expected a vocab.txt"
        )
    twice = [t for t, count in Counter(tokens).items() if count > 1]
    if twice:
        raise ValueError(f"largebatch.data_options.vocabulary {path!r} holds {twice[0]!r} more than once")
    return Vocabulary(tokens, is_lowercased)
