"""AutoTP, pipeline stages with tied weights, and experts, through the real launcher: norms over the right ranks."""

import importlib.util
import json

import pytest
import torch
from torch import nn

import largebatch
from support import launching, model_parallel_runs
from support.model_parallel_runs import NUM_STEPS, OPTIONS, Embedding, Hidden, ratios_of, word_loss, words

pytestmark = pytest.mark.launcher


def run(kind, stage, folder, num_ranks):
    """[ranks][steps] of (loss, {layer: trust ratio})."""
    script = model_parallel_runs.__file__
    code, out, err = launching.finish(launching.start(script, kind, stage, folder, num_ranks=num_ranks))
    assert code == 0, f"exit code {code}\n{out}\n{err}"
    return [json.loads((folder / f"{kind}_{stage}_rank{rank}.json").read_text()) for rank in range(num_ranks)]


def trained(model, loss_of_step):
    """[steps] of (loss, {layer: trust ratio}) in one process without DeepSpeed."""
    optimizer = largebatch.LAMB(model.parameters(), model=model, **OPTIONS)
    steps = []
    for step in range(NUM_STEPS):
        loss = loss_of_step(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), ratios_of(optimizer)))
    return steps


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_autotp_trains_as_one_process(tmp_path):
    model, tokens = model_parallel_runs.llama(), model_parallel_runs.tokens()
    expected = trained(model, lambda step: model(input_ids=tokens, labels=tokens).loss)
    for found in run("autotp", 1, tmp_path, num_ranks=2):
        for (loss, ratios), (expected_loss, expected_ratios) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert ratios == pytest.approx(expected_ratios, rel=1e-3)  # gradients are sums in another order


class WholePipeline(nn.Module):
    """What the two stages are together, with the names that the pipeline gives."""

    def __init__(self):
        super().__init__()
        self.tied_modules = nn.ModuleDict({"words": Embedding()})
        for seed in (1, 2, 3):
            self.add_module(str(seed), Hidden(seed))

    def forward(self, batch):
        embedding = self.tied_modules["words"]
        hidden = embedding(batch)
        for seed in (1, 2, 3):
            hidden = self.get_submodule(str(seed))(hidden)
        return word_loss(embedding.logits(hidden), (batch + 1) % 11)


def test_a_pipeline_with_tied_weights_trains_as_one_process(tmp_path):
    """Two stages, each on two ranks that share the data and, under ZeRO 1, the state."""
    model = WholePipeline()
    expected = trained(
        model, lambda step: torch.stack([model(batch) for rank in (0, 1) for batch in words(step, rank)]).mean()
    )
    found = run("pipeline", 1, tmp_path, num_ranks=4)
    for ranks_steps in found:
        for (loss, ratios), (expected_loss, expected_ratios) in zip(ranks_steps, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert ratios == pytest.approx({name: expected_ratios[name] for name in ratios}, rel=1e-3)
    for layer in expected[0][1]:
        assert any(layer in steps[0][1] for steps in found)
    # the tied weight has a copy in each stage, which must not drift apart
    tied = {tuple(ratios["tied_modules.words.weight"] for _, ratios in steps) for steps in found}
    assert len(tied) == 1


def test_experts_step_alike_whole_and_sharded(tmp_path):
    """Four experts on two ranks, twice: stage 0 has them whole, stage 2 cuts each over the two ranks that hold it."""
    whole, sharded = (run("experts", stage, tmp_path, num_ranks=4) for stage in (0, 2))
    for whole_steps, sharded_steps in zip(whole, sharded, strict=True):
        for (loss, ratios), (sharded_loss, sharded_ratios) in zip(whole_steps, sharded_steps, strict=True):
            assert sharded_loss == pytest.approx(loss, rel=1e-6)
            assert sharded_ratios == pytest.approx(ratios, rel=1e-5)
    first, second = whole[0][-1][1], whole[1][-1][1]
    expert = next(name for name in first if "deepspeed_experts.0.weight" in name)
    assert (
        first[expert] != second[expert] == whole[3][-1][1][expert]
    )  # different experts; the same one on ranks 1 and 3
