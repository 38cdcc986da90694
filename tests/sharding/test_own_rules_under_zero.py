"""Rules that a user has written, selected by name in a ds_config: as exact as ours under the engine, and resumable anywhere."""

import functools

import pytest
import torch

from support import checkpoint_runs, engine_runs, own_rules
from support.problems import relative_error

NUM_STEPS = 20
BOUND = 3e-6
CPU = {"offload_optimizer": {"device": "cpu"}}
SMALL = {"sub_group_size": 700, "stage3_param_persistence_threshold": 0}
LAYOUTS = {
    "stage0-fp32": {"stage": 0, "dtype": "fp32"},
    "stage0-bf16": {"stage": 0, "dtype": "bf16"},
    "stage1-fp32": {"stage": 1, "dtype": "fp32"},
    "stage1-fp16": {"stage": 1, "dtype": "fp16"},
    "stage2-bf16": {"stage": 2, "dtype": "bf16"},
    "stage2-fp32-offload": {"stage": 2, "dtype": "fp32", "zero": CPU},
    "stage3-fp32": {"stage": 3, "dtype": "fp32", "zero": SMALL},
    "stage3-bf16-offload": {"stage": 3, "dtype": "bf16", "zero": SMALL | CPU},
}

each_rule = pytest.mark.parametrize("rule", own_rules.OPTIONS)


@functools.cache
def reference(rule, num_groups):
    return engine_runs.unsharded(rule, NUM_STEPS, num_groups)


@each_rule
@pytest.mark.parametrize("world_size, num_groups", [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_unsharded(rank_pool, layout, rule, world_size, num_groups):
    results = rank_pool.run(
        world_size, engine_runs.train, rule, num_steps=NUM_STEPS, num_groups=num_groups, **LAYOUTS[layout]
    )
    expected, expected_ratios = reference(rule, num_groups)
    assert relative_error(engine_runs.assemble([r["pieces"] for r in results]), expected) < BOUND
    for result in results:
        assert result["ratios"] == results[0]["ratios"], "trust ratios differ between ranks"
    for found, wanted in zip(results[0]["ratios"], expected_ratios, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)  # compiled sums are taken in the order of the machine's vectors


PAIRS = [
    ((2, dict(stage=1)), (3, dict(stage=3, zero=SMALL))),
    ((3, dict(stage=3, zero=SMALL)), (1, dict(stage=0))),
    ((1, dict(stage=0)), (2, dict(stage=2, dtype="bf16"))),
    ((2, dict(stage=2, zero=CPU)), (2, dict(stage=2, zero=CPU))),
]


@pytest.mark.parametrize("rule", [*own_rules.OPTIONS, "LANS"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p}".replace(" ", ""))
def test_resumes_at_another_layout(rank_pool, tmp_path, pair, rule):
    """The state of layers goes along: one row for each layer, wherever it lies then."""
    (save_ranks, save_layout), (ranks, layout) = pair
    rank_pool.run(save_ranks, checkpoint_runs.save_at, rule, save_layout, str(tmp_path), num_groups=2)
    resumed = rank_pool.run(ranks, checkpoint_runs.resume_at, rule, layout, str(tmp_path), num_groups=2)
    _, last, ratios = checkpoint_runs.uninterrupted(rule, 2)
    assert relative_error(engine_runs.assemble([result["pieces"] for result in resumed]), last) < BOUND
    for result in resumed:
        assert result["ratios"] == pytest.approx(ratios, rel=1e-6)
        assert result["counts"] == (6, 0, 6)


def layer_states(rule, layout):
    with engine_runs.engine_for(engine_runs.ds_config(rule, **layout), num_steps=3) as engine:
        for step in range(3):
            engine_runs.take_step(engine, step)
        name = type(engine.basic_optimizer).rule_class.layer_state[0]
        return {layer: figures[name] for layer, figures in engine.basic_optimizer.layer_stats().items()}


@each_rule
def test_every_rank_shows_the_same_state_of_layers(rank_pool, rule):
    found = rank_pool.run(3, layer_states, rule, {"stage": 2})
    assert found[0] == found[1] == found[2]
    assert len({round(value, 9) for value in found[0].values()}) == len(engine_runs.SHAPES)
    assert all(torch.isfinite(torch.tensor(list(found[0].values()))))
