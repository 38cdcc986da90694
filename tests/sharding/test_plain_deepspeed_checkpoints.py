"""Checkpoints that DeepSpeed has written without largebatch, loaded into engines of ours: taken over, or refused, and said."""

import pytest

import largebatch
from largebatch.engine.lr_schedulers import SCHEDULERS
from support import engine_runs

SCHEDULER = {"type": "WarmupDecayLR", "params": {"total_num_steps": 20, "warmup_num_steps": 2, "warmup_max_lr": 0.5}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
POLY = {"type": "WarmupPolyLR", "params": {"total_steps": 20}}


def engine_of(config):
    import deepspeed

    model = engine_runs.LinearLoss()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.layers, config=config)
    return engine


def config_of(stage, optimizer, scheduler):
    extra = {"optimizer": optimizer, "scheduler": scheduler, "zero_allow_untested_optimizer": True}
    return engine_runs.ds_config("LAMB", stage, extra=extra)


def save(stage, folder, num_steps=3):
    """As DeepSpeed would without us: no word of a layout."""
    engine = engine_of(config_of(stage, ADAMW, SCHEDULER))
    for step in range(num_steps):
        engine_runs.take_step(engine, step)
    type(engine).save_checkpoint.__wrapped__(engine, folder, tag="saved")
    engine.destroy()


def load(stage, folder, optimizer, **options):
    """(position of the schedule, learning rate) after a load."""
    engine = engine_of(config_of(stage, {"type": optimizer, "params": {"lr": 0.25}}, POLY))
    try:
        engine.load_checkpoint(folder, tag="saved", **options)
        return engine.lr_scheduler.last_batch_iteration, engine.get_lr()[0]
    finally:
        engine.destroy()


@pytest.mark.parametrize("optimizer", ["LARS", "LAMB"])
@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 1), (2, 2), (2, 3)])
def test_another_optimizers_state_is_refused_at_every_stage(rank_pool, tmp_path, ranks, stage, optimizer):
    """Under ZeRO, DeepSpeed puts AdamW's first moment where LARS looks for its momentum."""
    rank_pool.run(ranks, save, stage, str(tmp_path))
    with pytest.raises(AssertionError, match=f"holds the state of AdamW, and this run trains with {optimizer}"):
        rank_pool.run(ranks, load, stage, str(tmp_path), optimizer)


@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 1), (2, 2)])
def test_weights_and_step_are_taken_over_without_it(rank_pool, tmp_path, ranks, stage):
    """The schedule goes on from the third step, with its own peak."""
    rank_pool.run(ranks, save, stage, str(tmp_path))
    found = rank_pool.run(ranks, load, stage, str(tmp_path), "LAMB", load_optimizer_states=False)
    for position, lr in found:
        assert position == 3 and lr == pytest.approx(0.25 * (1 - 3 / 20) ** 2)


def momenta():
    found = {}
    for name, params in (("LARS", {"lr": 0.1, "momentum": 0.75}), ("LAMB", {"lr": 0.1, "betas": [0.5, 0.75]})):
        engine = engine_of(engine_runs.ds_config("LAMB", 1, extra={"optimizer": {"type": name, "params": params}}))
        found[name] = engine.get_mom()
        engine.destroy()
    return found


def test_the_momentum_in_deepspeeds_log(rank_pool):
    assert rank_pool.run(2, momenta) == [{"LARS": [0.75], "LAMB": [(0.5, 0.75)]}] * 2


def test_the_schedules_of_this_file_exist():
    largebatch.register()
    assert POLY["type"] in SCHEDULERS
