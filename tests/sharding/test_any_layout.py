"""Checkpoints saved at one layout and resumed at another: equal to the run in plain PyTorch that was never interrupted."""

import functools
import random
import shutil

import pytest
import torch

from support import checkpoint_runs, engine_runs
from support.problems import relative_error

BOUND = 3e-6

LAYOUTS = [(world_size, stage) for world_size in (1, 2, 3, 4) for stage in (0, 1, 2, 3)]
PAIRS = random.Random(6).sample([(a, b) for a in LAYOUTS for b in LAYOUTS], 16)
"""Of all 256, which benchmarks/checkpoint_matrix.py runs."""


@functools.cache
def expected(algorithm, num_groups=1):
    return checkpoint_runs.uninterrupted(algorithm, num_groups)


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """Saves each layout once."""
    folder, done = str(tmp_path_factory.mktemp("checkpoints")), {}

    def save(algorithm, world_size, num_groups=1, **layout):
        tag = f"{algorithm}-{world_size}-{num_groups}-{layout}".replace(" ", "").replace("/", "")
        if tag not in done:
            done[tag] = rank_pool.run(
                world_size, checkpoint_runs.save_at, algorithm, layout, folder, tag, num_groups=num_groups
            )
        return folder, tag, done[tag]

    return save


def check_resumed(resumed, algorithm, num_groups=1):
    """Weights, every trust ratio, learning rates and counts of the uninterrupted run; the model follows the masters."""
    first, last, ratios = expected(algorithm, num_groups)
    found = engine_runs.assemble([result["pieces"] for result in resumed])
    assert relative_error(found, last) < BOUND
    for result in resumed:
        assert result["ratios"] == ratios
        assert result["counts"] == (6, 0, 6)
        assert len(result["lr"]) == num_groups
        assert result["decays"] == [engine_runs.OPTIONS[algorithm]["weight_decay"], 0.0][:num_groups]
        for weights, master in zip(result["model"], first, strict=True):
            error = relative_error([weights], [master])
            assert error < {torch.float32: BOUND, torch.bfloat16: 2**-8, torch.float16: 2**-11}[weights.dtype]


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0][0]}ranks{p[0][1]}-to-{p[1][0]}ranks{p[1][1]}")
def test_world_sizes_and_stages(rank_pool, saved, pair, algorithm):
    (save_ranks, save_stage), (ranks, stage) = pair
    folder, tag, end = saved(algorithm, save_ranks, stage=save_stage)
    resumed = rank_pool.run(ranks, checkpoint_runs.resume_at, algorithm, {"stage": stage}, folder, tag)
    check_resumed(resumed, algorithm)
    if pair[0] == pair[1]:
        assert checkpoint_runs.same_bits(end, resumed)


CPU = {"offload_optimizer": {"device": "cpu"}}
SMALL = {"sub_group_size": 700}
OTHERS = [
    ((2, dict(stage=1)), (3, dict(stage=1, dtype="bf16", grad_accum="fp32"))),
    ((2, dict(stage=1, dtype="bf16", grad_accum="fp32")), (3, dict(stage=3, dtype="fp16", zero=SMALL))),
    ((3, dict(stage=3, dtype="fp16", zero=SMALL)), (2, dict(stage=0, dtype="bf16"))),
    ((1, dict(stage=0, dtype="bf16")), (4, dict(stage=2, dtype="bf16", zero=CPU))),
    ((4, dict(stage=2, dtype="bf16", zero=CPU)), (4, dict(stage=2, dtype="bf16"))),
    ((2, dict(stage=3, zero=SMALL)), (2, dict(stage=3, zero={"sub_group_size": 1500} | CPU))),
    ((2, dict(stage=3, dtype="bf16", zero=CPU)), (1, dict(stage=0))),
    ((3, dict(stage=0, dtype="fp16")), (2, dict(stage=2, zero={"round_robin_gradients": True}))),
    ((2, dict(stage=2, zero={"round_robin_gradients": True})), (3, dict(stage=0, dtype="fp16"))),
    ((2, dict(stage=1, accumulation=2)), (3, dict(stage=2, dtype="bf16", accumulation=3))),
]  # fmt: skip


ALGORITHMS = ("LARS", "LAMB", "NLAMB", "NNLAMB")
CASES = [(pair, ALGORITHMS[(i + j) % 4]) for j in (0, 2) for i, pair in enumerate(OTHERS)]
"""Each pair with two of the four; the matrix draws the rest."""


@pytest.mark.parametrize("pair, algorithm", CASES, ids=lambda p: f"{p}".replace(" ", ""))
def test_precisions_offload_and_cuts(rank_pool, saved, pair, algorithm):
    """Into a fresh engine with LARS and LAMB, into one that has trained already with the others."""
    (save_ranks, save_layout), (ranks, layout) = pair
    folder, tag, _ = saved(algorithm, save_ranks, num_groups=2, **save_layout)
    num_ahead = 0 if algorithm in ("LARS", "LAMB") else 2
    resumed = rank_pool.run(
        ranks, checkpoint_runs.resume_at, algorithm, layout, folder, tag, num_groups=2, num_ahead=num_ahead
    )
    check_resumed(resumed, algorithm, num_groups=2)


BASELINES = {
    "SGD": {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}},
    "AdamW": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.01, "torch_adam": True}},
    "Adagrad": {"type": "Adagrad", "params": {"lr": 0.02, "weight_decay": 0.01}},
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(rank_pool, saved, name):
    zero = {"zero_allow_untested_optimizer": True, "optimizer": BASELINES[name]}
    layouts = [(2, 1, "fp32"), (3, 3, "bf16"), (1, 0, "fp32"), (2, 0, "bf16"), (2, 2, "fp16")]
    ends = {}
    for ranks, stage, dtype in layouts:
        options = dict(stage=stage, dtype=dtype, extra=zero)
        folder, tag, end = saved("LAMB", ranks, num_groups=2, **options)  # the name is that of the schedule only
        ends[ranks, stage, dtype] = (folder, tag, engine_runs.assemble([r["pieces"] for r in end]))
    for (folder, tag, end), (ranks, stage, dtype) in zip(ends.values(), layouts[1:] + layouts[:1], strict=True):
        options = dict(stage=stage, dtype=dtype, extra=zero)
        resumed = rank_pool.run(ranks, checkpoint_runs.resume_at, "LAMB", options, folder, tag, num_groups=2)
        assert relative_error(engine_runs.assemble([r["pieces"] for r in resumed]), end) < BOUND
        assert all(result["decays"] == [0.01, 0.0] and result["counts"] == (6, 0, 6) for result in resumed)


def test_another_number_of_param_groups(rank_pool, saved):
    """The state follows the layers; the options of a group are those of the ds_config."""
    for before, now in ((1, 2), (2, 1)):
        folder, tag, _ = saved("LAMB", 2, num_groups=before, stage=1)
        resumed = rank_pool.run(3, checkpoint_runs.resume_at, "LAMB", {"stage": 2}, folder, tag, num_groups=now)
        found = engine_runs.assemble([result["pieces"] for result in resumed])
        assert relative_error(found, checkpoint_runs.regrouped("LAMB", before, now)) < BOUND
        assert all(len(result["lr"]) == now and result["ratios"] for result in resumed)


def test_dynamic_loss_scale(rank_pool, saved):
    """Saved between two growths; the next comes when it would have come, at every stage."""
    scale = {"fp16": {"enabled": True, "initial_scale_power": 6, "hysteresis": 2, "loss_scale_window": 2}}
    folder, tag, end = saved("LARS", 2, stage=1, dtype="fp16", extra=scale)
    grown = end[0]["loss_scale"]
    assert grown > 2**6
    for ranks, stage in ((3, 0), (3, 1), (1, 3)):
        options = dict(stage=stage, dtype="fp16", extra=scale)
        resumed = rank_pool.run(ranks, checkpoint_runs.resume_at, "LARS", options, folder, tag)
        assert [result["loss_scale"] for result in resumed] == [grown] * ranks
        check_resumed(resumed, "LARS")
        folder_0, tag_0, _ = saved("LARS", 2, **options)
        resumed = rank_pool.run(
            2, checkpoint_runs.resume_at, "LARS", dict(stage=2, dtype="fp16", extra=scale), folder_0, tag_0
        )
        assert [result["loss_scale"] for result in resumed] == [grown] * 2


@pytest.mark.parametrize(
    "pair", [((2, 3), (3, 2)), ((3, 2), (2, 3)), ((2, 0), (4, 3)), ((4, 3), (1, 0)), ((2, 3), (3, 3))]
)
def test_buffers_and_frozen_parameters(rank_pool, tmp_path, pair):
    (save_ranks, save_stage), (ranks, stage) = pair
    rank_pool.run(save_ranks, checkpoint_runs.save_with_buffers, save_stage, str(tmp_path))
    for result in rank_pool.run(ranks, checkpoint_runs.load_with_buffers, stage, str(tmp_path)):
        assert result["frozen"].equal(checkpoint_runs.FROZEN + 1) and result["buffer"].equal(checkpoint_runs.BUFFER + 1)
        assert result["weights_only"].equal(checkpoint_runs.FROZEN + 1) and result["has_state"] is False


def refusal(layout, folder, tag, algorithm="LAMB", num_groups=1, shapes=engine_runs.SHAPES):
    config = engine_runs.ds_config(algorithm, **layout)
    with engine_runs.engine_for(config, num_groups=num_groups, model=engine_runs.LinearLoss(shapes)) as engine:
        before = engine_runs.master_pieces(engine)
        with pytest.raises(ValueError) as error:
            engine.load_checkpoint(folder, tag=tag)
        after = engine_runs.master_pieces(engine)
    return str(error.value), all(a[2].equal(b[2]) for a, b in zip(before, after, strict=True))


def test_refusals(rank_pool, saved, tmp_path):
    """One message on all ranks, and nothing has been changed."""
    folder, tag, _ = saved("LAMB", 2, stage=1)
    copy = tmp_path / tag
    shutil.copytree(f"{folder}/{tag}", copy)
    (copy / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    old = tmp_path / "old"
    shutil.copytree(f"{folder}/{tag}", old)
    states = torch.load(old / "mp_rank_00_model_states.pt", weights_only=False)
    del states["largebatch_layout"]
    torch.save(states, old / "mp_rank_00_model_states.pt")
    smaller = engine_runs.SHAPES[:-2] + ((3, 5), (9,), (2,))
    for layout, place, options, words in (
        ({"stage": 3}, (folder, tag), {"algorithm": "LARS"}, "holds the state of LAMB, and this run trains with LARS"),
        ({"stage": 2}, (folder, tag), {"shapes": smaller}, "holds other layers than the model: layer10 is not in the"),
        ({"stage": 2}, (str(tmp_path), tag), {}, "zero_pp_rank_1_mp_rank_00_optim_states.pt are not there"),
        ({"stage": 1}, (str(tmp_path), "old"), {}, "was saved on 2 ranks at ZeRO stage 1 by a version that did not"),
        ({"stage": 3}, (str(tmp_path), "old"), {}, "Load it there once and save it again"),
    ):
        for message, is_unchanged in rank_pool.run(3, refusal, layout, *place, **options):
            assert words in message and is_unchanged, message
    # where it was saved, an old one loads as ever
    resumed = rank_pool.run(2, checkpoint_runs.resume_at, "LAMB", {"stage": 1}, str(tmp_path), "old")
    check_resumed(resumed, "LAMB")
