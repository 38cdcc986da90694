"""BERT and its pre-training: transformers' network, a loss that falls, the same training under ZeRO on two ranks."""

import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers", reason="optional: pip install 'largebatch[bert]'")

import largebatch  # noqa: E402
from largebatch.launch.trainer.pretraining import Pretraining, check_same_on_all_ranks, losses_of  # noqa: E402
from largebatch.models.bert import build_bert, mask_of_pairs  # noqa: E402
from largebatch.models.catalogue import check_model  # noqa: E402

TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_positions": 32, "dropout": 0.0}
LAMB = {
    "lr": 0.02,
    "weight_decay": 0.01,
    "exclude_from_adaptation": ["bias", "norm"],
    "exclude_from_weight_decay": ["bias", "norm"],
}
CPU = torch.device("cpu")
NUM_STEPS, GLOBAL_BATCH = 6, 8


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Numbers that count up: what is masked follows from what stands beside it."""
    random = np.random.default_rng(0)
    digits = "zero one two three four five six seven eight nine".split()
    sentences = []
    for _ in range(400):
        start = random.integers(10)
        sentences.append(" ".join(digits[(start + i) % 10] for i in range(random.integers(4, 9))) + ".")
    path = tmp_path_factory.mktemp("text") / "counting.txt"
    path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return str(path)


def tiny_task(text_file, **section):
    neutral = {"augmentation": "none", "mixup": 0.0, "label_smoothing": 0.0, "batch_norm": {}}
    given = {"model": "bert", "model_options": TINY, "data_options": {"sequence_length": 24, "vocab_size": 60}}
    return Pretraining(given | neutral | section, text_file)


@pytest.mark.parametrize("preset, count", [("bert-base", 110106428), ("bert-large", 336226108)])
def test_parameter_count(preset, count):
    with torch.device("meta"):
        model = build_bert(vocab_size=30522, sequence_length=512, preset=preset)
    assert sum(p.numel() for p in model.parameters()) == count
    assert f"{count:,}" in sys.modules[build_bert.__module__].__doc__
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_loss_is_that_of_transformers(text_file):
    """transformers averages over all masked tokens: the same where every sample has as many."""
    task = tiny_task(
        text_file, data_options={"sequence_length": 24, "vocab_size": 60, "short_sequence_probability": 0.0}
    )
    model = task.build_model().eval()
    theirs = transformers.BertForPreTraining(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    batch = task.train.batch(list(range(6)), seed=1, numbers=list(range(6)))
    labels = torch.full_like(batch.tokens, -100).scatter_(1, batch.masked_positions, batch.masked_tokens)
    outputs = theirs(
        batch.tokens,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.segments,
        labels=labels,
        next_sentence_label=batch.is_random,
    )
    assert (batch.masked_weights > 0).all()
    assert task.loss(model, batch, dtype=torch.float32).item() == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_padding_does_not_change_a_sample(text_file):
    task = tiny_task(
        text_file, data_options={"sequence_length": 24, "vocab_size": 60, "short_sequence_probability": 1.0}
    )
    model = task.build_model().eval()
    batch = task.train.batch([3], seed=1, numbers=[0])
    size = int(batch.attention_mask.sum())
    assert size < 24
    cut = batch._replace(**{name: getattr(batch, name)[:, :size] for name in ("tokens", "segments", "attention_mask")})
    for found, expected in zip(losses_of(model, batch), losses_of(model, cut), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("short", [0.0, 1.0])
def test_a_mask_that_nobody_has_to_read_changes_nothing(text_file, short):
    """On a GPU the network gets one mask for each pair of tokens, or none: what transformers makes of ours, bit for bit."""
    options = {"sequence_length": 24, "vocab_size": 60, "short_sequence_probability": short}
    task = tiny_task(text_file, data_options=options)
    model = task.build_model().eval()
    batch = task.train.batch(list(range(6)), seed=1, numbers=list(range(6)))
    assert (batch.without_idle_mask().attention_mask is None) == bool(batch.attention_mask.all()) == (short == 0)
    seen = []
    hook = model.bert.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    expected = model(*batch[:4])
    hook.remove()
    masked = batch.without_idle_mask()
    if masked.attention_mask is not None:
        masked = masked._replace(attention_mask=mask_of_pairs(masked.attention_mask))
        assert seen[0].dtype == masked.attention_mask.dtype and torch.equal(seen[0], masked.attention_mask)
    assert all(torch.equal(a, b) for a, b in zip(model(*masked[:4]), expected, strict=True))


def losses_of_learning_by_heart(text_file):
    """Inside a rank, whose one thread is faster for tensors of this size: losses of 70 steps on the same 16 samples."""
    task = tiny_task(text_file)
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = largebatch.LAMB(model.parameters(), model=model, **LAMB)
    batch = task.train.batch(list(range(16)), seed=1, numbers=list(range(16)))
    losses = []
    for step in range(70):
        for group in optimizer.param_groups:
            group["lr"] = 0.08 * min(1, (step + 1) / 10) * (1 - step / 70)
        loss = task.loss(model, batch, dtype=torch.float32)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, len(task.corpus.vocabulary)


def test_a_small_bert_learns_its_samples_by_heart(text_file, rank_pool):
    """The neighbours say which digit is masked: far below the 2.4 + 0.7 of guessing by frequency."""
    ((losses, vocab_size),) = rank_pool.run(1, losses_of_learning_by_heart, text_file)
    assert losses[0] == pytest.approx(np.log(vocab_size) + np.log(2), rel=0.05)
    assert losses[-1] < 1.0


def test_figures_of_the_test_set(text_file):
    task = tiny_task(text_file)
    model = task.build_model().train()
    figures = task.evaluate(model, dtype=torch.float32, rank=0, world_size=1, device=CPU)
    assert list(figures) == ["mlm_accuracy", "nsp_accuracy", "mlm_loss", "nsp_loss", "test_loss"] and model.training
    numbers = list(range(len(task.test)))
    batch = task.test.batch(numbers, seed=0, numbers=numbers)
    with torch.no_grad():
        mlm_losses, nsp_losses = losses_of(model.eval(), batch)
        logits, _ = model(*batch[:4])
    used = batch.masked_weights > 0
    assert figures["mlm_loss"] == pytest.approx(mlm_losses.mean().item(), rel=1e-5)
    assert figures["test_loss"] == pytest.approx((mlm_losses + nsp_losses).mean().item(), rel=1e-5)
    assert figures["mlm_accuracy"] == pytest.approx(
        (logits.argmax(2) == batch.masked_tokens)[used].double().mean().item()
    )


def trained_by_engine(text_file, stage, micro_batch):
    """Mean loss of each step, figures of the test set, and weights, of the engine's training with LAMB."""
    import deepspeed

    task = tiny_task(text_file)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "LAMB", "params": LAMB},
        "zero_optimization": {"stage": stage},
    }
    model = task.build_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    layout = dict(
        seed=1, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, rank=rank, world_size=world_size, device=CPU
    )
    batches, losses = task.micro_batches(**layout), []
    for _ in range(NUM_STEPS):
        total = torch.zeros(())
        for _ in range(engine.gradient_accumulation_steps()):
            loss = task.loss(engine, next(batches), dtype=torch.float32)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / engine.gradient_accumulation_steps()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    batches.close()
    figures = task.evaluate(engine, dtype=torch.float32, rank=rank, world_size=world_size, device=CPU)
    is_tied = model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    excluded = {p.name for p in engine.basic_optimizer.excluded_layers}
    engine.destroy()
    return losses, figures, is_tied, excluded


def trained_plainly(text_file):
    task = tiny_task(text_file)
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = largebatch.LAMB(model.parameters(), model=model, **LAMB)
    layout = dict(seed=1, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH, rank=0, world_size=1, device=CPU)
    batches, losses = task.micro_batches(**layout), []
    for _ in range(NUM_STEPS):
        loss = task.loss(model, next(batches), dtype=torch.float32)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    batches.close()
    return losses, task.evaluate(model, dtype=torch.float32, rank=0, world_size=1, device=CPU)


def test_training_under_zero_is_plain_training(text_file, rank_pool):
    """Tied embeddings, and gradients that no rank holds whole; what is left is the order of fp32 sums."""
    expected_losses, expected_figures = trained_plainly(text_file)
    assert expected_losses[-1] < expected_losses[0]
    for world_size, stage, micro_batch in ((1, 0, 4), (2, 1, 2), (2, 2, 4), (2, 3, 4)):
        for losses, figures, is_tied, excluded in rank_pool.run(
            world_size, trained_by_engine, text_file, stage, micro_batch
        ):
            assert losses == pytest.approx(expected_losses, rel=1e-4), (world_size, stage)
            assert figures == pytest.approx(expected_figures, rel=1e-3)
            assert is_tied
            assert {"bert.embeddings.LayerNorm.weight", "cls.predictions.bias"} <= excluded
            assert not any(name.endswith("embeddings.weight") for name in excluded)


def refusal(digests):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        check_same_on_all_ranks(digests[rank], rank, world_size, CPU)
    except RuntimeError as error:
        return str(error)
    return None


def test_ranks_with_other_text_are_refused(rank_pool):
    first, second = "ab" * 32, "cd" * 32
    assert rank_pool.run(2, refusal, [first, first]) == [None, None]
    own, other = rank_pool.run(2, refusal, [first, second])
    assert own.startswith("rank 0 of 2: 1 ranks have not that of rank 0")
    assert other.startswith(
        "rank 1 of 2: this rank's text or vocabulary is not that of rank 0; give --data the same files"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "bert-larg"}, r"model_options.preset is 'bert-larg'.*'bert-large'\?"),
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size is 30; expected a multiple of num_heads, which is 4"),
        ({"max_positions": 16}, "max_positions is 16; expected at least the sequence length, 24"),
        ({"num_layers": 0}, "num_layers is 0; expected an integer >= 1"),
        ({"dropout": 1}, "dropout is 1; expected a number >= 0 and < 1"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_bert(vocab_size=60, sequence_length=24, **options)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"model": "lenet"}, "largebatch.model is 'lenet' with largebatch.data \"text\"; expected one of 'bert'"),
        ({"mixup": 0.2}, "largebatch.mixup is 0.2, which has no effect on text"),
        ({"label_smoothing": 0.1}, "largebatch.label_smoothing is 0.1, which has no effect on text"),
        ({"model_options": {"hidden": 3}}, "largebatch.model_options.hidden is not an option of bert"),
    ],
)
def test_sections_that_are_refused(section, message, text_file):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_task(text_file, **section)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    check_model("bert", {"preset": "bert-large"})
    with pytest.raises(RuntimeError, match=r"BERT needs the package transformers .*pip install 'largebatch\[bert\]'"):
        build_bert(vocab_size=60, sequence_length=24)
