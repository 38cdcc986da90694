"""DeepSpeed's checkpoints of our optimizers: bit-identical at the same layout, and readable by its converters."""

import os
import subprocess
import sys

import pytest
import torch

from support import engine_runs
from support.problems import relative_error

FIRST, REST = 4, 3
OPTIONS = {
    "stage0-fp32": dict(stage=0, dtype="fp32"),
    "stage0-bf16": dict(stage=0, dtype="bf16"),
    "stage0-fp16": dict(stage=0, dtype="fp16"),
    "stage1-fp32": dict(stage=1, dtype="fp32"),
    "stage1-bf16-fp32acc": dict(stage=1, dtype="bf16", grad_accum="fp32"),
    "stage2-fp16": dict(stage=2, dtype="fp16"),
    "stage2-bf16-offload": dict(stage=2, dtype="bf16", zero={"offload_optimizer": {"device": "cpu"}}),
    "stage3-fp32": dict(stage=3, dtype="fp32", zero={"sub_group_size": 700}),
    "stage3-bf16": dict(stage=3, dtype="bf16"),
    "stage3-fp16-offload": dict(stage=3, dtype="fp16", zero={"offload_optimizer": {"device": "cpu"}}),
}


def save_then_go_on(algorithm, options, folder):
    """Inside a rank: trains, saves, trains on; returns the masters."""
    config = engine_runs.ds_config(algorithm, **options)
    with engine_runs.engine_for(config, num_groups=2, num_steps=FIRST + REST) as engine:
        for step in range(FIRST):
            engine_runs.take_step(engine, step)
        engine.save_checkpoint(folder, tag="saved")
        for step in range(FIRST, FIRST + REST):
            engine_runs.take_step(engine, step)
        return engine_runs.master_pieces(engine), engine.basic_optimizer.layer_stats()


def load_then_go_on(algorithm, options, folder, tag="saved", extra=None, num_ahead=0):
    """Inside a rank: a fresh engine (which may have trained already), loads, trains on."""
    config = engine_runs.ds_config(algorithm, **options, extra=extra)
    with engine_runs.engine_for(config, num_groups=2, num_steps=FIRST + REST) as engine:
        for step in range(num_ahead):
            engine_runs.take_step(engine, step)
        engine.load_checkpoint(folder, tag=tag)
        for step in range(FIRST, FIRST + REST):
            engine_runs.take_step(engine, step)
        decays = [group["weight_decay"] for group in engine.basic_optimizer.param_groups]
        return engine_runs.master_pieces(engine), engine.basic_optimizer.layer_stats(), decays


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB", "NLAMB"])
@pytest.mark.parametrize("layout", OPTIONS)
def test_same_layout_continues_with_the_same_bits(rank_pool, tmp_path, layout, algorithm):
    saved = rank_pool.run(2, save_then_go_on, algorithm, OPTIONS[layout], str(tmp_path))
    for num_ahead in (0, 2):
        loaded = rank_pool.run(2, load_then_go_on, algorithm, OPTIONS[layout], str(tmp_path), num_ahead=num_ahead)
        for (pieces, stats), (other, other_stats, decays) in zip(saved, loaded, strict=True):
            assert stats == other_stats
            for (name, start, values), (other_name, other_start, others) in zip(pieces, other, strict=True):
                assert (name, start) == (other_name, other_start) and torch.equal(values, others), name
            assert decays == [engine_runs.ALGORITHMS[algorithm]["weight_decay"], 0.0]


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_universal_checkpoint(rank_pool, tmp_path, stage, algorithm):
    """DeepSpeed's converter, then the same and another world size."""
    options = dict(stage=stage, dtype="fp32", zero={"sub_group_size": 700} if stage == 3 else {})
    saved = rank_pool.run(2, save_then_go_on, algorithm, options, str(tmp_path))
    expected = engine_runs.assemble([pieces for pieces, _ in saved])
    command = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(tmp_path / "saved"), "--output_folder", str(tmp_path / "universal")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    assert result.returncode == 0, result.stdout + result.stderr
    for world_size in (2, 3):
        loaded = rank_pool.run(
            world_size, load_then_go_on, algorithm, options, str(tmp_path), tag="universal",
            extra={"checkpoint": {"load_universal": True}},
        )  # fmt: skip
        found = engine_runs.assemble([pieces for pieces, _, _ in loaded])
        assert relative_error(found, expected) < 1e-6
        assert all(decays[1] == 0.0 for _, _, decays in loaded), "the second group keeps its own weight decay"
