"""The schedules as classes that a ds_config's ``scheduler`` section names.

A scheduler multiplies each param group's own learning rate (the optimizer's ``lr``) by a factor that depends on the
step alone. They are schedulers of torch's, so that Accelerate, Lightning and SequentialLR take them for what they are; but they
accept the optimizer wrappers that DeepSpeed builds, and unlike in DeepSpeed's, the first step of a warm-up from zero is not lost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from largebatch import schedule
from largebatch.config import is_finite, is_number

logger = logging.getLogger("largebatch")


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside DeepSpeed's wrappers."""
    while not isinstance(optimizer, Optimizer):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(f"{type(optimizer).__name__} is not a torch optimizer and wraps none")
        optimizer = optimizer.optimizer
    return optimizer


def in_steps(name: str, steps: Any, epochs: Any, steps_per_epoch: Any, default: int | None) -> int:
    """A length that may be given in steps or in epochs, in steps.

    Raises:
        ValueError: both or neither are given, or epochs without their length.
    """
    given = {f"{name}_steps": steps, f"{name}_epochs": epochs}
    for key, value in given.items():
        if value == "auto":
            raise ValueError(
                f"scheduler.params.{key} is 'auto', which launch/train.py fills in; write the number. Hugging Face's Trainer "
                "and Accelerate fill in total_num_steps and warmup_num_steps"
            )
        if value is not None and (not is_number(value) or not is_finite(value) or not 0 <= value < 2**63):
            raise ValueError(f"scheduler.params.{key} is {value!r}; expected a number >= 0 and < 2^63")
    if steps is not None and epochs is not None:
        raise ValueError(f"scheduler.params has both {name}_steps and {name}_epochs; give one of them")
    if steps is not None:
        return round(steps)
    if epochs is not None:
        if not is_number(steps_per_epoch) or not is_finite(steps_per_epoch) or not steps_per_epoch > 0:
            raise ValueError(
                f"scheduler.params.{name}_epochs is {epochs!r} and steps_per_epoch is {steps_per_epoch!r}; expected a "
                f"number > 0 (data set size / global batch; launch/train.py fills in 'auto'), or give {name}_steps"
            )
        if not epochs * steps_per_epoch < 2**63:
            raise ValueError(
                f"scheduler.params.{name}_epochs is {epochs!r} with {steps_per_epoch!r} steps_per_epoch; expected less than 2^63 steps"
            )
        return round(epochs * steps_per_epoch)
    if default is None:
        raise ValueError(f"scheduler.params needs {name}_steps, or {name}_epochs and steps_per_epoch")
    return default


def under_one_name(name: str, steps: Any, num_steps: Any) -> Any:
    """A length under our name or under that of DeepSpeed's own schedulers, which other programs fill in for "auto".

    Raises:
        ValueError: both are given.
    """
    if steps is not None and num_steps is not None:
        raise ValueError(f"scheduler.params has both {name}_steps and {name}_num_steps; they mean the same, give one")
    return num_steps if steps is None else steps


def share_of_peak(name: str, value: Any) -> float:
    """The value, once it is seen to lie between 0 and 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"scheduler.params.{name} is {value!r}; expected 0 to 1")
    return value


def end_share(end_lr: Any, end_factor: float, peak_lr: float) -> float:
    """The end of a decay as a share of the peak."""
    if end_factor:
        raise ValueError("scheduler.params has both end_lr and end_factor; give one of them")
    if not is_number(end_lr) or not 0 <= end_lr <= peak_lr:
        raise ValueError(
            f"scheduler.params.end_lr is {end_lr!r}; expected 0 to the peak, optimizer.params.lr = {peak_lr}"
        )
    return end_lr / peak_lr if peak_lr else 0.0


class FactorLR(LRScheduler):
    """Base of the JSON schedulers: lr of a group at step t = the group's peak * factor(t).

    The peak is the group's ``lr``; where that is what an earlier schedule has made of it, that schedule's peak: torch's and a loaded
    state leave it in ``initial_lr``. ``step()`` is called after each optimizer step, as DeepSpeed does; on construction the
    learning rate of step 0 is set. ``state_dict`` holds the step and the peaks. A param group that is added later follows the
    same factor from the next step on.
    """

    def __init__(self, optimizer: Any):
        # without torch's constructor: it takes no wrapper of DeepSpeed's, and wraps the optimizer's step to count its calls
        self.optimizer = torch_optimizer(optimizer)
        self.last_epoch = 0
        self._step_count = 1
        earlier = getattr(self.optimizer, "_largebatch_schedule", None)
        scheduled = {} if earlier is None else earlier.scheduled()
        self._peaks: list[tuple[dict[str, Any], float]] = []
        for group in self.optimizer.param_groups:
            lr = float(group["lr"])
            if id(group) in scheduled:
                peak, scheduled_lr = scheduled[id(group)]
                group["initial_lr"] = peak if lr == scheduled_lr else lr
            self._peaks.append((group, float(group.get("initial_lr", lr))))
        self.optimizer._largebatch_schedule = self
        self._set()

    def factor(self, step: int) -> float:
        raise NotImplementedError

    def scheduled(self) -> dict[int, tuple[float, float]]:
        """id of a param group -> its peak, and the learning rate that this schedule has set last."""
        return {id(g): (peak, float(lr)) for (g, peak), lr in zip(self._peaks, self._last_lr, strict=True)}

    @property
    def last_batch_iteration(self) -> int:
        """The step, under the name of DeepSpeed's schedulers."""
        return self.last_epoch

    @property
    def peak_lrs(self) -> list[float]:
        """Of each param group. A group is known again as the same object; or, when a loaded state has replaced all, by its number."""
        groups = self.optimizer.param_groups
        by_group = {id(group): peak for group, peak in self._peaks}
        if self._peaks and not any(id(group) in by_group for group in groups):
            by_group = {id(group): peak for group, (_, peak) in zip(groups, self._peaks, strict=False)}
        for group in groups:
            if id(group) not in by_group:
                by_group[id(group)] = float(group.get("initial_lr", group["lr"]))
            group.setdefault("initial_lr", by_group[id(group)])
        self._peaks = [(group, by_group[id(group)]) for group in groups]
        return [peak for _, peak in self._peaks]

    @property
    def base_lrs(self) -> list[float]:
        """The peaks, under torch's name."""
        return self.peak_lrs

    def get_lr(self) -> list[float]:
        factor = self.factor(self.last_epoch)
        return [peak * factor for peak in self.peak_lrs]

    def get_last_lr(self) -> list[float]:
        return self._last_lr

    def _set(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # whoever has captured a step reads it there
            else:
                group["lr"] = lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Moves on by one optimizer step, or to the given one."""
        self._step_count += 1
        self.last_epoch = self.last_epoch + 1 if last_batch_iteration is None else last_batch_iteration
        self._set()

    _update_lr = _initial_step = step  # torch's SequentialLR calls these

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_epoch, "peak_lrs": self.peak_lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the step and the peaks; of another schedule's state, as DeepSpeed's or torch's own, the step alone.

        Raises:
            ValueError: the state does not say at which step it was saved.
        """
        peaks = state_dict.get("peak_lrs")
        step = state_dict.get("last_batch_iteration", state_dict.get("last_epoch"))
        if peaks is None and is_number(state_dict.get("last_batch_iteration")):
            step += 1  # DeepSpeed's own begin with -1
        if isinstance(step, Tensor) and step.numel() == 1:
            step = step.item()
        if not is_number(step) or not is_finite(step):
            raise ValueError(
                f"the scheduler's state holds {', '.join(map(repr, state_dict)) or 'nothing'}, and none of it says at which step "
                "it was saved (last_batch_iteration, or torch's last_epoch). Load without it (load_lr_scheduler_states=False)"
            )
        self.last_epoch = max(0, int(step))
        if peaks is None:
            logger.warning(
                "the checkpoint's schedule is another one than %s: its step, %d, is taken over, its learning rates are not; "
                "the peaks stay %s",
                type(self).__name__,
                self.last_epoch,
                self.peak_lrs,
            )
        else:
            own = self.peak_lrs[len(peaks) :]
            groups = self.optimizer.param_groups
            self._peaks = list(zip(groups, [*map(float, peaks), *own], strict=False))
        self._set()


class WarmupDecayLR(FactorLR):
    """A warm-up and then some decay."""

    def __init__(self, optimizer, warmup_steps, warmup_epochs, warmup_start_factor, warmup_power, steps_per_epoch):
        self.num_warmup_steps = in_steps("warmup", warmup_steps, warmup_epochs, steps_per_epoch, default=0)
        self.warmup_start_factor = share_of_peak("warmup_start_factor", warmup_start_factor)
        if not is_number(warmup_power) or not is_finite(warmup_power) or warmup_power <= 0:
            raise ValueError(f"scheduler.params.warmup_power is {warmup_power!r}; expected a number > 0")
        self.warmup_power = warmup_power
        super().__init__(optimizer)

    def decay_factor(self, step: int) -> float:
        raise NotImplementedError

    def factor(self, step: int) -> float:
        if step < self.num_warmup_steps:
            return schedule.warmup_factor(
                step,
                num_warmup_steps=self.num_warmup_steps,
                start_factor=self.warmup_start_factor,
                power=self.warmup_power,
            )
        return self.decay_factor(step)


class WarmupPolyLR(WarmupDecayLR):
    """Warm-up, then polynomial decay to zero (power 2 for LARS, 1 for LAMB; arXiv:1708.03888, 1904.00962).

    With a constant phase between the two it is the schedule of LANS (arXiv:2006.13484).

    Args:
        total_steps | total_epochs: length of the whole schedule, warm-up included.
        warmup_steps | warmup_epochs: length of the warm-up, default 0; epochs may be fractions.
        total_num_steps, warmup_num_steps: the same as total_steps and warmup_steps, under the names of DeepSpeed's own
            schedulers, for which Hugging Face's Trainer and Accelerate fill in "auto".
        steps_per_epoch: data set size / global batch, where epochs are used.
        power: >= 0, of the decay. warmup_power: > 0, of the warm-up; 1 is linear.
        warmup_start_factor, end_factor: 0 to 1, shares of the peak.
        end_lr: >= 0, learning rate at the end in place of ``end_factor`` (MLPerf: 1e-4); with several param groups,
            that of the first, and the others keep their proportion.
        decay_from: "warmup" (the decay begins after the warm-up, with the peak) or "start" (it runs from step 0 on, so
            that the peak is never reached: 1904.00962's eta_0 (1 - t/T), the schedule of the BERT codes).
        constant_steps | constant_epochs: length of the phase at the peak between warm-up and decay, default 0.
    """

    def __init__(
        self,
        optimizer,
        total_steps=None,
        total_epochs=None,
        warmup_steps=None,
        warmup_epochs=None,
        steps_per_epoch=None,
        power=2.0,
        warmup_start_factor=0.0,
        warmup_power=1.0,
        end_factor=0.0,
        end_lr=None,
        decay_from="warmup",
        total_num_steps=None,
        warmup_num_steps=None,
        constant_steps=None,
        constant_epochs=None,
    ):
        total_steps = under_one_name("total", total_steps, total_num_steps)
        warmup_steps = under_one_name("warmup", warmup_steps, warmup_num_steps)
        self.num_steps = in_steps("total", total_steps, total_epochs, steps_per_epoch, default=None)
        if not is_number(power) or not is_finite(power) or power < 0:
            raise ValueError(f"scheduler.params.power is {power!r}; expected a number >= 0")
        if decay_from not in ("warmup", "start"):
            raise ValueError(f"scheduler.params.decay_from is {decay_from!r}; expected 'warmup' or 'start'")
        self.power, self.decay_from = power, decay_from
        self.num_constant_steps = in_steps("constant", constant_steps, constant_epochs, steps_per_epoch, default=0)
        if self.num_constant_steps and decay_from == "start":
            raise ValueError(
                f"scheduler.params has a constant phase of {self.num_constant_steps} steps and decay_from 'start', where the decay "
                "runs from step 0 on; leave one of them out"
            )
        self.end_factor = share_of_peak("end_factor", end_factor)
        if end_lr is not None:
            self.end_factor = end_share(end_lr, end_factor, torch_optimizer(optimizer).param_groups[0]["lr"])
        super().__init__(optimizer, warmup_steps, warmup_epochs, warmup_start_factor, warmup_power, steps_per_epoch)

    def decay_factor(self, step: int) -> float:
        return schedule.polynomial_factor(
            step,
            num_steps=self.num_steps,
            num_warmup_steps=0 if self.decay_from == "start" else self.num_warmup_steps + self.num_constant_steps,
            power=self.power,
            end_factor=self.end_factor,
        )


class WarmupCosineDecayLR(WarmupDecayLR):
    """Warm-up, then half a cosine to zero (arXiv:1608.03983). Arguments as for :class:`WarmupPolyLR`."""

    def __init__(
        self,
        optimizer,
        total_steps=None,
        total_epochs=None,
        warmup_steps=None,
        warmup_epochs=None,
        steps_per_epoch=None,
        warmup_start_factor=0.0,
        warmup_power=1.0,
        end_factor=0.0,
        total_num_steps=None,
        warmup_num_steps=None,
    ):
        total_steps = under_one_name("total", total_steps, total_num_steps)
        warmup_steps = under_one_name("warmup", warmup_steps, warmup_num_steps)
        self.num_steps = in_steps("total", total_steps, total_epochs, steps_per_epoch, default=None)
        self.end_factor = share_of_peak("end_factor", end_factor)
        super().__init__(optimizer, warmup_steps, warmup_epochs, warmup_start_factor, warmup_power, steps_per_epoch)

    def decay_factor(self, step: int) -> float:
        return schedule.cosine_factor(
            step, num_steps=self.num_steps, num_warmup_steps=self.num_warmup_steps, end_factor=self.end_factor
        )


class WarmupStepLR(WarmupDecayLR):
    """Warm-up, then times ``gamma`` at each milestone (arXiv:1706.02677: 0.1 at epochs 30, 60, 80).

    Args:
        milestone_steps | milestone_epochs: where the learning rate drops, ascending.
        gamma: > 0, factor of each drop.
        warmup_steps | warmup_epochs, warmup_start_factor, warmup_power, steps_per_epoch: as for :class:`WarmupPolyLR`.
    """

    def __init__(
        self,
        optimizer,
        milestone_steps: Sequence[int] | None = None,
        milestone_epochs: Sequence[float] | None = None,
        warmup_steps=None,
        warmup_epochs=None,
        steps_per_epoch=None,
        gamma=0.1,
        warmup_start_factor=0.0,
        warmup_power=1.0,
        warmup_num_steps=None,
    ):
        warmup_steps = under_one_name("warmup", warmup_steps, warmup_num_steps)
        if (milestone_steps is None) == (milestone_epochs is None):
            raise ValueError("scheduler.params needs either milestone_steps or milestone_epochs")
        if not is_number(gamma) or not is_finite(gamma) or gamma <= 0:
            raise ValueError(f"scheduler.params.gamma is {gamma!r}; expected a number > 0")
        for name, milestones in (("milestone_steps", milestone_steps), ("milestone_epochs", milestone_epochs)):
            if milestones is not None and not isinstance(milestones, (list, tuple)):
                raise ValueError(
                    f"scheduler.params.{name} is {milestones!r}; expected a list of numbers >= 0, ascending"
                )
        if milestone_steps is not None:
            lengths = [(milestone, None) for milestone in milestone_steps]
        else:
            lengths = [(None, milestone) for milestone in milestone_epochs]
        self.milestones = [in_steps("milestone", s, e, steps_per_epoch, default=None) for s, e in lengths]
        self.gamma = gamma
        super().__init__(optimizer, warmup_steps, warmup_epochs, warmup_start_factor, warmup_power, steps_per_epoch)

    def decay_factor(self, step: int) -> float:
        return schedule.step_factor(step, milestones=self.milestones, gamma=self.gamma)


SCHEDULERS = {cls.__name__: cls for cls in (WarmupPolyLR, WarmupCosineDecayLR, WarmupStepLR)}
"""JSON ``scheduler.type`` -> class."""
