"""Two faults of DeepSpeed 0.19.8 with fp16, repaired on the engines that step an optimizer of ours or a baseline.

- Growth: the wrappers raise the dynamic loss scale before they divide the gradients by it, so each step at which it
  grows uses half of the gradient (stage_1_and_2.py, stage3.py, unfused_optimizer.py: ``_update_scale`` comes before
  ``unscale_and_clip_grads``). Here the growth waits until the step is done; a reduction after an overflow does not.
- Stage 0: ``engine.backward`` multiplies the loss by the scale for ZeRO wrappers only, but FP16_UnfusedOptimizer divides
  the gradients by it all the same (since 0.18.3; DeepSpeed pull request 8393). Here the loss is multiplied. That
  wrapper also ignores ``hysteresis`` and ``consecutive_hysteresis``; here it follows the JSON.

LAMB hides both nearly (its step does not depend on the size of the gradient), LARS does not.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from largebatch.engine.internals import internal
from largebatch.engine.wrappers import UNFUSED


def repair(engine: Any) -> None:
    """Changes the methods of this engine and its wrapper only. Does nothing unless fp16 is on."""
    if not engine.fp16_enabled():
        return
    if type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer":
        if internal("scale_if_loss") is not None:
            scale_loss_of(engine)
        follow_json(engine)
    grow_after_step(engine.optimizer)


def grow_after_step(wrapper: Any) -> None:
    update_scale, step = wrapper._update_scale, wrapper.step
    is_growth_due = False

    @functools.wraps(update_scale)
    def _update_scale(has_overflow=False):
        nonlocal is_growth_due
        if has_overflow:
            update_scale(has_overflow)
        else:
            is_growth_due = True

    @functools.wraps(step)
    def step_then_grow(*args, **kwargs):
        nonlocal is_growth_due
        result = step(*args, **kwargs)
        if is_growth_due:
            is_growth_due = False
            update_scale(False)
        return result

    wrapper._update_scale, wrapper.step = _update_scale, step_then_grow


def scale_loss_of(engine: Any) -> None:
    backward = engine.backward

    @functools.wraps(backward)
    def backward_of_scaled_loss(loss, *args, **kwargs):
        scale = engine.optimizer.loss_scale
        return backward(loss.float() * scale, *args, **kwargs) / scale

    engine.backward = backward_of_scaled_loss


def follow_json(engine: Any) -> None:
    """Gives the stage-0 wrapper the dynamic scaler that ZeRO has, with hysteresis."""
    wrapper, state = engine.optimizer, UNFUSED.loss_scale_state(engine.optimizer)
    if not state.dynamic_loss_scale:
        return
    scaler = internal("CreateLossScaler")(
        dtype=torch.float16,
        static_loss_scale=engine.loss_scale(),
        dynamic_scaling=True,
        dynamic_loss_args=engine.dynamic_loss_scale_args(),
    )

    def _update_scale(skip=False):
        # the wrapper's fields are what its checkpoint holds
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = (
            state.cur_scale,
            state.cur_iter,
            state.last_overflow_iter,
        )
        scaler.update_scale(skip)
        state.cur_scale, state.cur_iter, state.last_overflow_iter = (
            scaler.cur_scale,
            scaler.cur_iter,
            scaler.last_overflow_iter,
        )

    wrapper._update_scale = _update_scale
