"""Text as samples of sentence pairs: the same everywhere, inside the text, and masked as often as BERT says."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers: pip install 'largebatch[bert]'")

from largebatch.launch.data.sentence_pairs import SentencePairs  # noqa: E402
from largebatch.launch.data.text import Sentences, TextOptions, load_text  # noqa: E402
from largebatch.launch.data.wordpiece import (  # noqa: E402
    SPECIAL_TOKENS,
    Vocabulary,
    read_vocabulary,
    train_vocabulary,
)
from largebatch.launch.trainer.pretraining import Pretraining  # noqa: E402

WORDS = (
    "the quick brown foxes jumped over a lazy dog while seven Wizards boxed quietly near Café Zürich in 1984".split()
)


def written_text(folder, seed=0, num_lines=300, name="a.txt"):
    """Sentences of random words, in paragraphs of 5 lines."""
    random = np.random.default_rng(seed)
    lines = []
    for line in range(num_lines):
        sentences = [" ".join(random.choice(WORDS, random.integers(3, 12))) + "." for _ in range(random.integers(1, 4))]
        lines += [" ".join(sentences)] + [""] * (line % 5 == 4)
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written_text(tmp_path_factory.mktemp("text"))


def trained_digest(folder):
    return load_text(folder, TextOptions(vocab_size=150)).digest


def test_vocabulary_is_the_same_in_every_process(folder, rank_pool):
    digests = {trained_digest(folder) for _ in range(3)} | set(rank_pool.run(2, trained_digest, folder))
    assert len(digests) == 1


def test_wordpieces_are_those_of_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'largebatch[bert]'")
    vocabulary = load_text(folder, TextOptions(vocab_size=150)).vocabulary
    vocabulary.save(str(tmp_path / "vocab.txt"))
    assert read_vocabulary(str(tmp_path / "vocab.txt")) == vocabulary
    theirs = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    text = "The QUICKEST brown-fox, jumping 1984 times; Café? Ünknown 語 words!"
    ids, lengths = vocabulary.encode([text])
    assert len(ids) == lengths[0]
    assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert vocabulary.id_of("[UNK]") in ids and "quick" in vocabulary.tokens
    assert [x.tolist() for x in vocabulary.encode(["Café", "", "cafe cafe"])] == [
        vocabulary.encode(["cafe"])[0].tolist() * 3,
        [n := len(vocabulary.encode(["cafe"])[0]), 0, 2 * n],
    ]


def test_frequent_pairs_are_merged_first():
    vocabulary = train_vocabulary(["ab ab ab cd"], vocab_size=5 + 4 + 2 + 1)
    assert vocabulary.tokens[-1] == "ab" and "cd" not in vocabulary.tokens
    with pytest.raises(
        ValueError, match="vocab_size is 10; expected at least 11: this text has 4 characters, 2 of which"
    ):
        train_vocabulary(["ab ab ab cd"], vocab_size=10)


def countable_text(document_lengths):
    """Sentences whose tokens count up from 5, so that a run of tokens says where it is from."""
    lengths = [n for document in document_lengths for n in document]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(5, 5 + starts[-1], dtype=np.int32)
    vocabulary = Vocabulary((*SPECIAL_TOKENS, *(f"t{i}" for i in range(len(tokens)))))
    return Sentences(tokens, starts, np.cumsum([len(d) for d in document_lengths])), vocabulary


documents = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=4).filter(
    lambda d: sum(map(len, d)) >= 2
)


@settings(max_examples=200, deadline=None)
@given(documents, st.integers(8, 40), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 1.0]), st.data())
def test_a_sample_is_two_runs_of_the_text_with_masks(document_lengths, length, number, short, data):
    sentences, vocabulary = countable_text(document_lengths)
    options = TextOptions(sequence_length=length, short_sequence_probability=short)
    pairs = SentencePairs(sentences, vocabulary, options)
    index = data.draw(st.integers(0, len(pairs) - 1))
    batch = pairs.batch([index], seed=3, numbers=[number])
    tokens, segments, attention, places, originals, weights, is_random = (t[0].numpy() for t in batch)
    pad, _, cls, sep, mask = range(5)
    size = attention.sum()
    assert np.array_equal(attention, np.arange(length) < size) and (tokens[size:] == pad).all()

    used = places[weights > 0]
    assert len(np.unique(used)) == len(used) == max(1, round((size - 3) * 0.15))
    assert weights.sum() == pytest.approx(1) and len(np.unique(weights[weights > 0])) == 1
    shown = tokens[used]
    assert (shown >= mask).all() and (originals[weights > 0] >= 5).all()
    text = tokens.copy()
    text[used] = originals[weights > 0]  # as it was before masking

    separators = np.flatnonzero(text == sep)
    assert text[0] == cls and len(separators) == 2 and separators[1] == size - 1
    first, second = text[1 : separators[0]], text[separators[0] + 1 : separators[1]]
    assert (segments[: len(first) + 2] == 0).all() and (segments[len(first) + 2 : size] == 1).all()
    for run in (first, second):
        assert len(run) and (np.diff(run) == 1).all()
        document = np.searchsorted(sentences.document_ends, sentence_of(run, sentences), side="right")
        assert (document == document[0]).all()
    anchor = np.searchsorted(sentences.starts, index * pairs.room, side="right") - 1
    assert sentences.starts[anchor] <= first[0] - 5
    if not is_random:
        # what lies between was cut off: the whole run is longer than a sample by less than its last sentence
        assert 0 < second[0] - first[-1] <= np.diff(sentences.starts).max()
        both = sentence_of(np.array([first[0], second[-1]]), sentences)
        assert len(np.unique(np.searchsorted(sentences.document_ends, both, side="right"))) == 1


def sentence_of(tokens, sentences):
    return np.searchsorted(sentences.starts, tokens - 5, side="right") - 1


def test_a_sample_depends_on_its_number_alone(folder):
    corpus = load_text(folder, TextOptions(vocab_size=150))
    pairs = SentencePairs(corpus.train, corpus.vocabulary, TextOptions(sequence_length=32))
    together = pairs.batch([4, 9, 4], seed=1, numbers=[70, 71, 2**40])
    alone = pairs.batch([9], seed=1, numbers=[71])
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together.tokens[0], together.tokens[2])  # another number
    assert not torch.equal(pairs.batch([9], seed=2, numbers=[71]).tokens, alone.tokens)  # another seed


def test_shares_of_masks_and_pairs_are_berts():
    """3,000 samples; bounds are four standard deviations of the counts."""
    sentences, vocabulary = countable_text([[7] * 4000])
    pairs = SentencePairs(sentences, vocabulary, TextOptions(sequence_length=64))
    indices = [i % len(pairs) for i in range(3000)]
    batch = pairs.batch(indices, seed=1, numbers=list(range(3000)))
    used = batch.masked_weights > 0
    shown, originals = batch.tokens.gather(1, batch.masked_positions)[used], batch.masked_tokens[used]

    def share(values):
        return values.double().mean().item(), 2 / len(values) ** 0.5

    for values, expected in (
        (shown == 4, 0.8),
        (shown == originals, 0.1),
        ((shown != 4) & (shown != originals), 0.1),
        (batch.is_random, 0.5),
        (batch.attention_mask.sum(1) < 64, 0.1 * (1 - 1 / 60)),
    ):
        found, bound = share(values)
        assert abs(found - expected) <= bound, expected
    random_tokens = shown[(shown != 4) & (shown != originals)]
    assert random_tokens.min() >= 5 and random_tokens.max() > 0.9 * len(vocabulary)
    assert used.sum() / (batch.attention_mask.sum() - 3 * 3000) == pytest.approx(0.15, rel=0.02)


def section(**data_options):
    options = {"sequence_length": 16, "vocab_size": 150} | data_options
    return {
        "model": "bert",
        "model_options": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 32, "dropout": 0.0},
        "data_options": options,
        "augmentation": "none",
        "mixup": 0.0,
        "label_smoothing": 0.0,
        "batch_norm": {},
    }


def samples_seen(folder, micro_batch, first_step, num_micro_steps):
    """{sample number: its tokens} of this rank in a global batch of 8."""
    task = Pretraining(section(), folder)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = task.micro_batches(
        seed=5,
        global_batch=8,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        first_step=first_step,
    )
    seen = {}
    for micro_step in range(num_micro_steps):
        start = first_step * 8 + (micro_step * world_size + rank) * micro_batch
        for row, tokens in enumerate(next(batches).tokens.tolist()):
            seen[start + row] = tokens
    batches.close()
    return seen


def test_training_sees_the_same_samples_in_every_layout(folder, rank_pool):
    (expected,) = rank_pool.run(1, samples_seen, folder, 8, 0, 6)
    assert len(expected) == 48
    for world_size, micro_batch, first_step in ((1, 2, 0), (2, 4, 0), (2, 1, 3), (4, 2, 5)):
        num_micro_steps = (6 - first_step) * 8 // (world_size * micro_batch)
        merged = {}
        for seen in rank_pool.run(world_size, samples_seen, folder, micro_batch, first_step, num_micro_steps):
            assert not merged.keys() & seen.keys()
            merged |= seen
        assert merged == {n: tokens for n, tokens in expected.items() if n >= first_step * 8}


def test_training_and_test_text_do_not_overlap(tmp_path):
    written_text(tmp_path, num_lines=40)
    written_text(tmp_path, num_lines=10, name="b.txt", seed=1)
    corpus = load_text(str(tmp_path), TextOptions(vocab_size=150, test_fraction=0.25))
    whole = []
    for name in ("a.txt", "b.txt"):
        text = (tmp_path / name).read_text(encoding="utf-8").replace("\n", " ")
        ids, _ = corpus.vocabulary.encode([text])
        whole.append(ids.tolist())
    pieces = []
    for part in (corpus.train, corpus.test):
        bounds = part.starts[np.concatenate([[0], part.document_ends])]
        assert len(part.document_ends) == 2 and bounds[-1] == len(part.tokens)
        pieces.append([part.tokens[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    assert [train + test for train, test in zip(*pieces, strict=True)] == whole
    assert all(0.1 < len(test) / len(train + test) < 0.4 for train, test in zip(*pieces, strict=True))


def test_blank_lines_end_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one two.\nthree.\n\n\nfour five. six.\n\nseven.\neight.\n", encoding="utf-8")
    corpus = load_text(str(tmp_path), TextOptions(vocab_size=60, documents="blank_lines", test_fraction=0.4))
    assert corpus.train.document_ends.tolist() == [2, 3]
    assert corpus.test.document_ends.tolist() == [1, 3]
    as_one = load_text(str(tmp_path / "a.txt"), TextOptions(vocab_size=60, test_fraction=0.4))
    assert as_one.train.document_ends.tolist() == [3]


def test_a_cached_corpus_is_the_corpus(tmp_path):
    folder = written_text(tmp_path / "text")
    options = TextOptions(vocab_size=150, cache=str(tmp_path / "cache"))
    fresh = load_text(folder, TextOptions(vocab_size=150))
    for _ in range(2):
        cached = load_text(folder, options)
        assert cached.digest == fresh.digest and isinstance(cached.train.tokens, np.memmap)
        for name in ("train", "test"):
            for key, values in vars(getattr(fresh, name)).items():
                assert np.array_equal(getattr(getattr(cached, name), key), values)
    written_text(tmp_path / "text", seed=1)
    assert load_text(folder, options).train.tokens.tolist() != fresh.train.tokens.tolist()


def test_text_that_cannot_be_read(tmp_path):
    options = TextOptions(vocab_size=150)
    with pytest.raises(ValueError, match="--data is missing; text needs a file, or a folder"):
        load_text(None, options)
    with pytest.raises(ValueError, match="does not exist; expected a text file or a folder of .txt files"):
        load_text(str(tmp_path / "nowhere"), options)
    with pytest.raises(ValueError, match="holds no .txt file"):
        load_text(str(tmp_path), options)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="a.txt' cannot be read as UTF-8 text: "):
        load_text(str(tmp_path), options)
    (tmp_path / "a.txt").write_text("One sentence. Two.", encoding="utf-8")
    with pytest.raises(ValueError, match="gives 0 sentences of test text; expected at least 2"):
        load_text(str(tmp_path), options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sequence_lenght": 128}, r"data_options.sequence_lenght is not an option of text; .*'sequence_length'\?"),
        ({"sequence_length": 7}, "largebatch.data_options.sequence_length is 7; expected an integer >= 8"),
        ({"mask_probability": 1.0}, "mask_probability is 1.0; expected a number > 0 and < 1"),
        ({"documents": "file"}, r"documents is 'file'.*'files'\?"),
        ({"vocab_size": 100, "vocabulary": "vocab.txt"}, "vocab_size has no effect beside vocabulary"),
        ({"vocabulary": "nowhere.txt"}, "vocabulary 'nowhere.txt' cannot be read: "),
        ({"vocabulary": 7}, "vocabulary is 7; expected null or a path"),
    ],
)
def test_options_that_are_refused(options, message, folder):
    with pytest.raises((ValueError, TypeError), match=message):
        load_text(folder, TextOptions.of(options))


def test_vocabularies_that_are_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks \[MASK\]; expected a vocab.txt"):
        read_vocabulary(str(path))
    path.write_text("\n".join((*SPECIAL_TOKENS, "word", "word")) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds 'word' more than once"):
        read_vocabulary(str(path))
