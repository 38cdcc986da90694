"""What stands in the place of DeepSpeed's functions and methods after register(): each takes the original and returns its successor.

largebatch.engine.patches says which of them goes where, and why.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from largebatch.engine import baselines, loss_scale, lost_micro_batches
from largebatch.engine.config_checks.arguments import as_user_error, check_arguments, is_answer
from largebatch.engine.internals import DeepSpeedFaultError, installed_version, internal
from largebatch.engine.tensor_parallel import read_cuts
from largebatch.engine.wrappers import read_layout
from largebatch.optim.lars import LARS
from largebatch.optim.layerwise import LayerwiseOptimizer
from largebatch.optim.registry import OPTIMIZERS

logger = logging.getLogger("largebatch")

Method = Callable[..., Any]


def checked(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """deepspeed.initialize behind our checks."""
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def checked_initialize(*args, **kwargs):
        arguments = signature.bind_partial(*args, **kwargs).arguments
        is_ours = check_arguments(arguments)
        try:
            return initialize(*args, **kwargs)
        except Exception as error:
            if not is_ours or not is_answer(error):
                raise
            raise as_user_error(error) from error

    return checked_initialize


def allowing_no_max_grad_norm(check: Method) -> Method:
    """Lets ``"max_grad_norm": null`` pass, which switches a preset's own clip off: DeepSpeed compares it with 0."""

    @functools.wraps(check)
    def _do_warning_check(self):
        given = self.optimizer_params
        if given is not None:  # a copy: up to 0.19.5 the check writes 0.0 into it
            is_off = given.get("max_grad_norm", 0) is None
            self.optimizer_params = {n: v for n, v in given.items() if n != "max_grad_norm" or not is_off}
        try:
            check(self)
        finally:
            self.optimizer_params = given

    return _do_warning_check


def is_stepped_by_ours(engine: Any) -> bool:
    return isinstance(getattr(engine, "basic_optimizer", None), LayerwiseOptimizer)


def building_ours(configure_basic: Method) -> Method:
    @functools.wraps(configure_basic)
    def _configure_basic_optimizer(self, model_parameters):
        if self.optimizer_name() == "adagrad" and not self.zero_use_cpu_optimizer():
            return baselines.Adagrad(model_parameters, **(self.optimizer_params() or {}))
        optimizer_class = OPTIMIZERS.get(self.optimizer_name())
        if optimizer_class is None:
            return configure_basic(self, model_parameters)
        return optimizer_class.from_json_params(model_parameters, self.optimizer_params() or {}, model=self.module)

    return _configure_basic_optimizer


def preparing_ours(check_optimizer: Method) -> Method:
    @functools.wraps(check_optimizer)
    def _do_optimizer_sanity_check(self, basic_optimizer):
        if isinstance(basic_optimizer, LayerwiseOptimizer):
            refuse_what_is_not_exact(self, basic_optimizer)
            basic_optimizer.name_layers(self.module)
            basic_optimizer.await_layout()
        else:
            refuse_what_replaced_ours(basic_optimizer)
        return check_optimizer(self, basic_optimizer)

    return _do_optimizer_sanity_check


def attaching_layout(configure: Method) -> Method:
    @functools.wraps(configure)
    def _configure_optimizer(self, client_optimizer, model_parameters):
        configure(self, client_optimizer, model_parameters)
        is_baseline = type(self.basic_optimizer) in baselines.BASELINES
        if is_stepped_by_ours(self) or is_baseline:
            refuse_faulty_bf16(self)
            lost_micro_batches.repair(self)
        if is_stepped_by_ours(self):
            self.basic_optimizer.attach(read_layout(self.optimizer), read_cuts(self))
            loss_scale.repair(self)
            log_exclusions(self.basic_optimizer)
        elif is_baseline:
            baselines.undo_first_step(self)
            loss_scale.repair(self)

    return _configure_optimizer


def restoring_options(load: Method) -> Method:
    """Of load_checkpoint: afterwards the optimizer's options are those of the ds_config."""

    @functools.wraps(load)
    def load_checkpoint(self, *args, **kwargs):
        result = load(self, *args, **kwargs)
        if is_stepped_by_ours(self):
            self.basic_optimizer.restore_configuration()
        return result

    return load_checkpoint


def showing_momentum(get_mom: Method) -> Method:
    @functools.wraps(get_mom)
    def momentum_or_betas(self):
        if isinstance(getattr(self, "basic_optimizer", None), LARS):
            return self._get_optimizer_param("momentum")
        return get_mom(self)

    return momentum_or_betas


def refuse_what_is_not_exact(engine: Any, optimizer: LayerwiseOptimizer) -> None:
    """Raises for every setting under which the norms of layers would not be those of unsharded training.

    Raises:
        ValueError: naming the setting and what to write instead.
    """
    name = type(optimizer).__name__
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            f"optimizer.params.max_grad_norm is {optimizer.max_grad_norm} and DeepSpeed clips at gradient_clipping="
            f"{engine.gradient_clipping()}, too. Under DeepSpeed the engine clips (the norm is the same): write "
            f'"gradient_clipping": {optimizer.max_grad_norm} at the top level of the ds_config and '
            '"max_grad_norm": null in optimizer.params'
        )
    offload = engine._config.zero_config.offload_optimizer
    if offload is not None and offload.ratio != 1.0:
        raise ValueError(
            f"zero_optimization.offload_optimizer.ratio is {offload.ratio}; DeepSpeed steps the rest of the parameters with "
            f"an AdamW of its own, not with {name}. Set it to 1.0"
        )
    if getattr(engine, "zenflow", False):
        raise ValueError(
            f"zero_optimization.zenflow is on; it splits layers in a way that {name} does not know. Remove it"
        )


def refuse_faulty_bf16(engine: Any) -> None:
    """Raises for two combinations that some DeepSpeed releases train wrongly, without a word.

    - Stage 0 before 0.18.6: ``engine._take_model_step`` never clears the gradients, so that every step adds to those of all
      steps before; fp16's dynamic loss scale is applied, since 0.18.3 to the gradients alone; and up to 0.18.4 a checkpoint is
      written without the optimizer's state.
    - BF16_Optimizer (stage 1, fp32 accumulation) from 0.18.3 to 0.18.9: ``engine._backward_epilogue`` reduces before the
      wrapper has taken in the last micro-batch, which each rank then keeps for itself (DeepSpeed pull request 7985);
      0.18.3 and 0.18.4 end in an AttributeError instead. With immediate_grad_update the gradients are there in time.

    Raises:
        DeepSpeedFaultError: saying what to write instead.
    """
    if not engine.bfloat16_enabled():
        return
    wrapper, version = engine.optimizer, installed_version()
    kind = type(wrapper).__name__
    if kind == "FP16_UnfusedOptimizer" and not hasattr(wrapper, "loss_scale_config"):
        raise DeepSpeedFaultError(
            f"bf16.enabled is true with zero_optimization.stage 0, where DeepSpeed {version} never clears the gradients and "
            "divides them by a loss scale. Set the stage to 1, or install DeepSpeed >= 0.18.6"
        )
    is_between = internal("scale_if_loss") is not None and Version(version).release < (0, 19)
    is_immediate = getattr(wrapper, "immediate_grad_update", False) and hasattr(wrapper, "custom_loss_scaler")
    if kind == "BF16_Optimizer" and is_between and not is_immediate:
        raise DeepSpeedFaultError(
            f"data_types.grad_accum_dtype is fp32 with bf16 and zero_optimization.stage 1, where DeepSpeed {version} leaves the "
            'last micro-batch out of the average over the ranks. Write "immediate_grad_update": true in the bf16 section, set '
            "the stage to 2, or install DeepSpeed >= 0.19"
        )


def refuse_what_replaced_ours(optimizer: Any) -> None:
    """Raises if a client has put another optimizer in the place of ours: its param groups still hold our options.

    With CPU offload, Accelerate makes DeepSpeedCPUAdam of any optimizer that it does not know, without a word.

    Raises:
        ValueError: naming both, and the setting that leaves ours alone.
    """
    if any("trust_ratio_bounds" in group for group in optimizer.param_groups):
        replaced = "LARS" if any("trust_coefficient" in group for group in optimizer.param_groups) else "LAMB"
        raise ValueError(
            f"{type(optimizer).__name__} was put in the place of largebatch.{replaced}; Accelerate does so under CPU offload. "
            'Write "zero_force_ds_cpu_optimizer": false at the top level of the ds_config, or name the optimizer in its '
            "optimizer section and prepare a DummyOptim"
        )


def log_exclusions(optimizer: LayerwiseOptimizer) -> None:
    """Says once which layers are left out, so that no exclusion is hidden."""
    excluded = optimizer.excluded_layers
    if not excluded:
        return
    without = {
        "adaptation": [p.name for p in excluded if not p.is_adapted],
        "weight decay": [p.name for p in excluded if not p.is_decayed],
    }
    parts = [
        f"{len(names)} from {what} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
        for what, names in without.items()
        if names
    ]
    logger.info("%s: %d layers; excluded: %s", type(optimizer).__name__, len(optimizer.layers), "; ".join(parts))
