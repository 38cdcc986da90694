"""The schedules: pure functions, and the classes that a ds_config names."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from largebatch import schedule
from largebatch.engine.lr_schedulers import SCHEDULERS, WarmupCosineDecayLR, WarmupPolyLR, WarmupStepLR


def test_a_constant_phase_between_warm_up_and_decay():
    """arXiv:2006.13484: x/w, then 1, then ((1 - x) / (1 - w - c))^power with shares w, c of the steps."""
    optimizer = optimizer_with(2.0)
    scheduler = WarmupPolyLR(optimizer, total_steps=10, warmup_steps=2, constant_steps=3, power=1)
    found = []
    for _ in range(11):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert found == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4, 0.0], abs=1e-15)
    with pytest.raises(ValueError, match="a constant phase of 3 steps and decay_from 'start'"):
        WarmupPolyLR(optimizer_with(2.0), total_steps=10, constant_steps=3, decay_from="start")


def test_warmup_reaches_the_peak_and_loses_no_step():
    assert [schedule.warmup_factor(t, num_warmup_steps=4) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.warmup_factor(0, num_warmup_steps=2, start_factor=0.5) == 0.75
    assert schedule.warmup_factor(0, num_warmup_steps=0) == 1.0
    # NVIDIA Caffe's ramp-up: (share of the way)^2 from start to peak
    factors = [schedule.warmup_factor(t, num_warmup_steps=4, start_factor=0.5, power=2) for t in range(5)]
    assert factors == [0.53125, 0.625, 0.78125, 1.0, 1.0]


def test_poly_2_of_the_lars_paper():
    factors = [schedule.polynomial_factor(t, num_steps=4, power=2) for t in range(6)]
    assert factors == [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]  # (1 - t/T)^2


def test_linear_decay_after_warmup():
    factor = lambda t: schedule.polynomial_factor(t, num_steps=10, num_warmup_steps=2, power=1)  # noqa: E731
    assert [factor(t) for t in (2, 6, 10, 11)] == [1.0, 0.5, 0.0, 0.0]


def test_step_decay_of_goyal():
    steps_per_epoch = 5
    milestones = [30 * steps_per_epoch, 60 * steps_per_epoch, 80 * steps_per_epoch]
    factors = [
        schedule.step_factor(epoch * steps_per_epoch, milestones=milestones) for epoch in (0, 29, 30, 60, 80, 89)
    ]
    assert factors == pytest.approx([1, 1, 0.1, 0.01, 0.001, 0.001])


def test_cosine():
    factor = lambda t: schedule.cosine_factor(t, num_steps=8)  # noqa: E731
    assert [factor(t) for t in (0, 4, 8, 9)] == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-15)
    assert factor(2) == pytest.approx(0.5 + math.sqrt(2) / 4)


@given(step=st.integers(0, 500), total=st.integers(1, 400), warm=st.integers(0, 400), power=st.floats(0.1, 4))
def test_factors_stay_between_zero_and_one(step, total, warm, power):
    for factor in (
        schedule.polynomial_factor(step, num_steps=total, num_warmup_steps=warm, power=power),
        schedule.cosine_factor(step, num_steps=total, num_warmup_steps=warm),
        schedule.warmup_factor(step, num_warmup_steps=warm),
    ):
        assert 0.0 <= factor <= 1.0


def test_scaling_rules():
    scaled = lambda rule: schedule.scaled_lr(rule, base_lr=0.1, base_batch=256, global_batch=4096)  # noqa: E731
    assert scaled("linear") == pytest.approx(1.6)
    assert scaled("sqrt") == pytest.approx(0.4)
    assert scaled("none") == 0.1
    with pytest.raises(ValueError, match="lr_scaling.rule is 'cubic'; expected one of 'none', 'linear', 'sqrt'"):
        scaled("cubic")
    with pytest.raises(ValueError, match="lr_scaling.base_batch is 0; expected a number > 0"):
        schedule.scaled_lr("sqrt", base_lr=0.1, base_batch=0, global_batch=1)


def optimizer_with(*lrs):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs])


class Wrapper:
    """As DeepSpeed's: not a torch optimizer, but has one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def trace(scheduler, num_steps):
    lrs = []
    for _ in range(num_steps):
        lrs.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return lrs


def test_poly_scheduler_in_epochs_and_groups_keep_their_proportion():
    optimizer = optimizer_with(2.0, 0.2)
    scheduler = WarmupPolyLR(Wrapper(optimizer), total_epochs=4, warmup_epochs=1, steps_per_epoch=2.5, power=1)
    assert (scheduler.num_steps, scheduler.num_warmup_steps) == (10, 2)
    assert trace(scheduler, 11) == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert optimizer.param_groups[1]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] / 10)


def test_poly_with_an_end_and_from_the_start():
    optimizer = optimizer_with(2.0, 0.2)
    scheduler = WarmupPolyLR(optimizer, total_steps=6, warmup_steps=2, power=2, end_lr=0.5)
    # MLPerf: (lr - end) (1 - t / T)^2 + end, t and T without the warm-up
    assert trace(scheduler, 8) == pytest.approx([1.0, 2.0, 2.0, 1.34375, 0.875, 0.59375, 0.5, 0.5])
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05)
    # BERT: lr (1 - t / T) once the warm-up is over
    scheduler = WarmupPolyLR(optimizer_with(1.0), total_steps=5, warmup_steps=2, power=1, decay_from="start")
    assert trace(scheduler, 6) == pytest.approx([0.5, 1.0, 0.6, 0.4, 0.2, 0.0])


def test_step_and_cosine_schedulers():
    milestones = WarmupStepLR(optimizer_with(1.0), milestone_steps=[3], warmup_steps=2, warmup_power=2)
    assert trace(milestones, 4) == pytest.approx([0.25, 1.0, 1.0, 0.1])
    milestones = WarmupStepLR(optimizer_with(1.0), milestone_epochs=[1, 2], steps_per_epoch=2, warmup_steps=1)
    assert trace(milestones, 5) == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    assert trace(WarmupCosineDecayLR(optimizer_with(1.0), total_steps=2), 3) == pytest.approx(
        [1.0, 0.5, 0.0], abs=1e-15
    )


def test_lengths_under_the_names_of_deepspeeds_schedulers():
    ours = dict(total_steps=7, warmup_steps=2)
    theirs = dict(total_num_steps=7, warmup_num_steps=2)
    for scheduler in (WarmupPolyLR, WarmupCosineDecayLR):
        assert trace(scheduler(optimizer_with(1.0), **theirs), 8) == trace(scheduler(optimizer_with(1.0), **ours), 8)
    milestones = WarmupStepLR(optimizer_with(1.0), milestone_steps=[3], warmup_num_steps=2)
    assert trace(milestones, 4) == pytest.approx([0.5, 1.0, 1.0, 0.1])


def test_scheduler_state_restores_the_learning_rate():
    first = WarmupPolyLR(optimizer_with(2.0), total_steps=10)
    for _ in range(4):
        first.step()
    optimizer = optimizer_with(7.0)
    second = WarmupPolyLR(optimizer, total_steps=10)
    second.load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == first.get_last_lr()[0] == pytest.approx(2.0 * 0.36)


@pytest.mark.parametrize(
    "params, message",
    [
        ({}, "needs total_steps, or total_epochs and steps_per_epoch"),
        ({"total_steps": "auto"}, "scheduler.params.total_steps is 'auto', which launch/train.py fills in"),
        ({"total_steps": 5, "total_epochs": 1}, "has both total_steps and total_epochs"),
        ({"total_steps": 5, "total_num_steps": 5}, "has both total_steps and total_num_steps; they mean the same"),
        ({"total_steps": 5, "warmup_steps": 1, "warmup_num_steps": 1}, "has both warmup_steps and warmup_num_steps"),
        ({"total_num_steps": "auto"}, "Accelerate fill in total_num_steps and warmup_num_steps"),
        ({"total_epochs": 5}, "steps_per_epoch is None; expected a number > 0"),
        ({"total_steps": -5}, "scheduler.params.total_steps is -5; expected a number >= 0"),
        ({"total_steps": 5, "power": -1}, "scheduler.params.power is -1"),
        ({"total_steps": 5, "end_factor": "0.1"}, "scheduler.params.end_factor is '0.1'; expected 0 to 1"),
        (
            {"total_steps": 5, "end_lr": 3.0},
            "scheduler.params.end_lr is 3.0; expected 0 to the peak, optimizer.params.lr = 1.0",
        ),
        ({"total_steps": 5, "end_lr": 0.1, "end_factor": 0.1}, "has both end_lr and end_factor"),
        (
            {"total_steps": 5, "decay_from": "peak"},
            "scheduler.params.decay_from is 'peak'; expected 'warmup' or 'start'",
        ),
        ({"total_steps": 5, "warmup_power": 0}, "scheduler.params.warmup_power is 0; expected a number > 0"),
        ({"total_steps": 5, "warmup_start_factor": 2}, "scheduler.params.warmup_start_factor is 2; expected 0 to 1"),
    ],
)
def test_illegal_scheduler_params(params, message):
    with pytest.raises(ValueError) as caught:
        WarmupPolyLR(optimizer_with(1.0), **params)
    assert message in str(caught.value)


def test_names_do_not_hide_deepspeeds_own():
    import deepspeed.runtime.lr_schedules as lr_schedules

    assert {"WarmupPolyLR", "WarmupCosineDecayLR", "WarmupStepLR"} == set(SCHEDULERS)
    # register() may have added ours by now
    own = {n for n, c in vars(lr_schedules).items() if getattr(c, "__module__", None) == lr_schedules.__name__}
    assert "WarmupCosineLR" in own
    assert not set(SCHEDULERS) & own


def test_epochs_beyond_counting_are_refused():
    with pytest.raises(ValueError, match=r"total_epochs is 1e\+18 with 10000.0 steps_per_epoch; expected less than"):
        WarmupPolyLR(optimizer_with(1.0), total_epochs=1e18, steps_per_epoch=10000.0)
