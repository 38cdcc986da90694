"""A text corpus as sentences of wordpieces: read from plain-text files, split into training and test text.

A sentence ends with the line, or with ".", "!" or "?" and a space. The last ``test_fraction`` of each file's sentences are test
text. Documents, inside which one sentence follows another, are the files, or with ``documents: "blank_lines"`` what lies
between blank lines (the format of Google's BERT).
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from largebatch.config import boolean, nearest_hint, number, one_of, reject
from largebatch.launch.data.wordpiece import Vocabulary, read_vocabulary, train_vocabulary

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SENTENCES_PER_CALL = 10_000


def integer_of_at_least(smallest: int):
    def check(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            reject(name, value, f"an integer >= {smallest}")

    return check


def path_or_none(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        reject(name, value, "null or a path", TypeError)


FRACTION = number("a number > 0 and < 1", lambda x: 0 < x < 1)


@dataclass(frozen=True)
class TextOptions:
    """The recipe's ``data_options`` for text. Checked on construction.

    Attributes:
        sequence_length: tokens of a sample, >= 8, special tokens and padding included.
        vocab_size: tokens of the vocabulary that is trained on the training text, at most.
        vocabulary: path of a vocab.txt to use instead; vocab_size has no effect then.
        lowercase: whether text is lower-cased and stripped of accents.
        documents: "files" or "blank_lines"; see the module's docstring.
        test_fraction: > 0 and < 1.
        mask_probability: > 0 and < 1, share of the tokens that are to be predicted.
        short_sequence_probability: >= 0 and <= 1, share of samples that are cut to a random shorter length.
        cache: folder for the tokenised corpus, mapped into memory by all ranks of a machine; null: tokenise at each start.
    """

    sequence_length: int = 128
    vocab_size: int = 8192
    vocabulary: str | None = None
    lowercase: bool = True
    documents: str = "files"
    test_fraction: float = 0.05
    mask_probability: float = 0.15
    short_sequence_probability: float = 0.1
    cache: str | None = None

    def __post_init__(self):
        for field in fields(self):
            OPTION_CHECKS[field.name](f"largebatch.data_options.{field.name}", getattr(self, field.name))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TextOptions:
        """From the recipe's section.

        Raises:
            ValueError, TypeError: an option is unknown, or its value illegal.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(
                    f"largebatch.data_options.{name} is not an option of text; expected one of {', '.join(known)}"
                    f"{nearest_hint(name, known)}"
                )
        if options.get("vocabulary") is not None and "vocab_size" in options:
            raise ValueError(
                "largebatch.data_options.vocab_size has no effect beside vocabulary; leave one of them out"
            )
        return cls(**options)


OPTION_CHECKS = {
    "sequence_length": integer_of_at_least(8),
    "vocab_size": integer_of_at_least(1),
    "vocabulary": path_or_none,
    "lowercase": boolean,
    "documents": one_of("files", "blank_lines"),
    "test_fraction": FRACTION,
    "mask_probability": FRACTION,
    "short_sequence_probability": number("a number >= 0 and <= 1", lambda x: 0 <= x <= 1),
    "cache": path_or_none,
}
CORPUS_OPTIONS = ("vocab_size", "vocabulary", "lowercase", "documents", "test_fraction")
"""What the tokenised corpus depends on."""


@dataclass(frozen=True)
class Sentences:
    """One part (training or test) of a corpus.

    Attributes:
        tokens: [num_tokens] int32, all sentences one after another.
        starts: [num_sentences + 1] int64, where each begins in ``tokens``; none is empty.
        document_ends: [num_documents] int64, the sentence after each document's last.
    """

    tokens: np.ndarray
    starts: np.ndarray
    document_ends: np.ndarray

    @property
    def num_sentences(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus."""

    vocabulary: Vocabulary
    train: Sentences
    test: Sentences

    @property
    def digest(self) -> str:
        """The same for the same vocabulary and the same numbers of sentences and tokens."""
        sizes = [(len(part.tokens), part.num_sentences) for part in (self.train, self.test)]
        return hashlib.sha256(f"{self.vocabulary.digest} {sizes}".encode()).hexdigest()


def text_files(path: str | None) -> list[str]:
    """A file, or the .txt files of a folder and its subfolders, sorted.

    Raises:
        ValueError: there are none; says what was looked for.
    """
    if path is None:
        raise ValueError("--data is missing; text needs a file, or a folder that holds .txt files")
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"--data is {path!r}, which does not exist; expected a text file or a folder of .txt files")
    found = [os.path.join(folder, n) for folder, _, names in os.walk(path) for n in names if n.endswith(".txt")]
    if not found:
        raise ValueError(f"--data {path!r} holds no .txt file")
    return sorted(found)


def sentences_of(path: str) -> Iterator[str]:
    """The sentences of a file; "" for a blank line.

    Raises:
        ValueError: the file cannot be read as UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                line = line.strip()
                yield from SENTENCE_END.split(line) if line else ("",)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data: {path!r} cannot be read as UTF-8 text: {error}") from None


@dataclass(frozen=True)
class TextFile:
    """A file's sentences, blank lines as "", cut into training and test text; read anew each time, never held.

    Attributes:
        border: the first sentence of the test text.
    """

    path: str
    border: int

    @classmethod
    def of(cls, path: str, test_fraction: float) -> TextFile:
        return cls(path, round(sum(1 for _ in sentences_of(path)) * (1 - test_fraction)))

    def train(self) -> Iterator[str]:
        return itertools.islice(sentences_of(self.path), self.border)

    def test(self) -> Iterator[str]:
        return itertools.islice(sentences_of(self.path), self.border, None)


def load_text(path: str | None, options: TextOptions) -> Corpus:
    """Reads and tokenises a corpus, or maps it from ``options.cache`` if it was tokenised before.

    Raises:
        ValueError: no text there, too little of it, or a file that is not UTF-8.
    """
    files = text_files(path)
    if options.cache is None:
        return tokenise(files, options)
    key = {name: value for name, value in asdict(options).items() if name in CORPUS_OPTIONS}
    state = [(os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]
    digest = hashlib.sha256(json.dumps([key, state]).encode()).hexdigest()
    folder = os.path.join(options.cache, digest[:16])
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first rank of a machine tokenises, the others wait for it
        complete = os.path.join(folder, "complete")
        if not os.path.exists(complete):
            save(tokenise(files, options), folder)
            open(complete, "w", encoding="utf-8").close()
    return load_saved(folder, options)


def tokenise(paths: list[str], options: TextOptions) -> Corpus:
    files = [TextFile.of(path, options.test_fraction) for path in paths]
    if options.vocabulary is None:
        training_text = itertools.chain.from_iterable(file.train() for file in files)
        vocabulary = train_vocabulary(training_text, vocab_size=options.vocab_size, is_lowercased=options.lowercase)
    else:
        vocabulary = read_vocabulary(options.vocabulary, options.lowercase)
    are_documents_files = options.documents == "files"
    corpus = Corpus(
        vocabulary,
        train=encoded([file.train() for file in files], vocabulary, are_documents_files),
        test=encoded([file.test() for file in files], vocabulary, are_documents_files),
    )
    for name, part in (("training", corpus.train), ("test", corpus.test)):
        if part.num_sentences < 2:
            raise ValueError(
                f"--data: {', '.join(paths)} give{'s'[: len(paths) == 1]} {part.num_sentences} sentences of {name} text; expected "
                "at least 2"
            )
    return corpus


def encoded(texts: list[Iterator[str]], vocabulary: Vocabulary, are_documents_files: bool) -> Sentences:
    """The sentences of all texts as token ids; those without a token are left out."""
    tokens, lengths, document_ends, num_sentences = [], [], [], 0
    for text in texts:
        while chunk := list(itertools.islice(text, SENTENCES_PER_CALL)):
            ids, lengths_of_chunk = vocabulary.encode(chunk)
            is_kept = lengths_of_chunk > 0
            ends = num_sentences + np.cumsum(is_kept)
            if not are_documents_files:
                document_ends += ends[~is_kept].tolist()
            num_sentences = int(ends[-1])
            tokens.append(ids)
            lengths.append(lengths_of_chunk[is_kept])
        document_ends.append(num_sentences)
    ends = np.unique(np.array(document_ends, dtype=np.int64))
    starts = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
    return Sentences(np.concatenate([np.empty(0, np.int32), *tokens]), starts, ends[ends > 0])


def save(corpus: Corpus, folder: str) -> None:
    corpus.vocabulary.save(os.path.join(folder, "vocab.txt"))
    for name, part in (("train", corpus.train), ("test", corpus.test)):
        for field in fields(Sentences):
            np.save(os.path.join(folder, f"{name}_{field.name}.npy"), getattr(part, field.name))


def load_saved(folder: str, options: TextOptions) -> Corpus:
    parts = (
        Sentences(
            **{f.name: np.load(os.path.join(folder, f"{n}_{f.name}.npy"), mmap_mode="r") for f in fields(Sentences)}
        )
        for n in ("train", "test")
    )
    return Corpus(read_vocabulary(os.path.join(folder, "vocab.txt"), options.lowercase), *parts)
