"""Teaches DeepSpeed the JSON types of largebatch. The only file that changes DeepSpeed's globals.

What is changed, and why there is no public door for it (DeepSpeed 0.19.8):
- ``config.DEEPSPEED_OPTIMIZERS``: names in it are lower-cased and may be handled by the engine; ours are added.
- ``engine.LAMB_OPTIMIZER``: switches on FusedLamb, an assertion against static loss scales and a step path without
  ``step()``; set to a name that no JSON can have, so that "LAMB" in any spelling is ours.
- ``zero.utils.ZERO_SUPPORTED_OPTIMIZERS``: our classes are added, so that ZeRO needs no "untested" flag for them;
  so is torch.optim.SGD, the papers' baseline: it is elementwise, and so exact however the parameters are cut.
- ``deepspeed.initialize``: checks a ds_config that names one of our optimizers before DeepSpeed reads it, and says in one
  line what DeepSpeed refuses with an error from deep inside (see largebatch.engine_config).
- ``DeepSpeedConfig._do_warning_check``: ``"max_grad_norm": null`` is no error.
- ``DeepSpeedEngine._configure_basic_optimizer``: builds our classes from their names, and for "Adagrad" one with torch's
  numbers that keeps its param groups under ZeRO (see largebatch.baselines).
- ``DeepSpeedEngine._do_optimizer_sanity_check``, ``_configure_optimizer``: before and after the engine wraps an
  optimizer of ours, however it was given; afterwards the layer map is attached.
- ``DeepSpeedEngine.save_checkpoint``, ``load_checkpoint``: a checkpoint says where its layers lie, and can be loaded at any
  layout (see largebatch.checkpoint); afterwards the optimizer's options are those of the ds_config again.
- ``DeepSpeedEngine.get_mom``: shows the momentum of LARS in the log, where DeepSpeed looks for betas and writes 0.0.
- ``_update_scale``, ``step`` and ``backward`` of single engines and wrappers under fp16: see largebatch.loss_scale; also
  with torch.optim's SGD, Adam and AdamW, whose stray first step at stage 0 is undone, too.
- ``lr_schedules``: our schedulers become attributes, where DeepSpeed looks their names up, and are listed in
  ``VALID_LR_SCHEDULES``, by which Accelerate knows the schedulers that the engine steps.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from largebatch import baselines, loss_scale
from largebatch.checkpoint.engine_methods import loading_any_layout, saving_layout
from largebatch.engine_config.arguments import check_arguments, in_our_words, is_answer
from largebatch.layer_map.tensor_parallel import read_cuts
from largebatch.layer_map.zero import TESTED_DEEPSPEED, read_layout
from largebatch.lr_schedulers import SCHEDULERS
from largebatch.optim.lamb import LAMB, NLAMB, NNLAMB
from largebatch.optim.lars import LARS
from largebatch.optim.layerwise import LayerwiseOptimizer

logger = logging.getLogger("largebatch")

OPTIMIZERS: dict[str, type[LayerwiseOptimizer]] = {cls.__name__.lower(): cls for cls in (LARS, LAMB, NLAMB, NNLAMB)}
"""JSON ``optimizer.type``, lower-cased -> class."""

UNREACHABLE_NAME = "deepspeed's own lamb, replaced by largebatch"

REQUIRED_INTERNALS = {
    "deepspeed.runtime.config": ("DEEPSPEED_OPTIMIZERS", "DeepSpeedConfig"),
    "deepspeed.runtime.engine": ("DEEPSPEED_OPTIMIZERS", "LAMB_OPTIMIZER", "DeepSpeedEngine"),
    "deepspeed.runtime.zero.utils": ("ZERO_SUPPORTED_OPTIMIZERS",),
    "deepspeed.runtime.lr_schedules": ("get_torch_optimizer", "VALID_LR_SCHEDULES"),
}
REQUIRED_ENGINE_METHODS = (
    "_configure_basic_optimizer",
    "_do_optimizer_sanity_check",
    "_configure_optimizer",
    "save_checkpoint",
    "load_checkpoint",
    "get_mom",
)


def register() -> None:
    """Makes ``"type": "LARS" | "LAMB" | "NLAMB" | "NNLAMB"`` and our schedulers known to DeepSpeed.

    Call it once before ``deepspeed.initialize``; further calls do nothing. DeepSpeed's own "Lamb" is taken over: its
    FusedLamb runs on GPUs only, one tensor at a time, folds the bias correction into the learning rate, and takes the
    norms of arbitrary slices under ZeRO.

    Raises:
        RuntimeError: DeepSpeed has no such internals as this was written against; names the missing one.
    """
    show_log()
    modules = {name: importlib.import_module(name) for name in REQUIRED_INTERNALS}
    engine_class = check_internals(modules)
    if getattr(engine_class, "_largebatch_is_registered", False):
        return
    import deepspeed

    modules["deepspeed.runtime.config"].DEEPSPEED_OPTIMIZERS.extend(
        name for name in OPTIMIZERS if name not in modules["deepspeed.runtime.config"].DEEPSPEED_OPTIMIZERS
    )
    modules["deepspeed.runtime.engine"].LAMB_OPTIMIZER = UNREACHABLE_NAME
    modules["deepspeed.runtime.zero.utils"].ZERO_SUPPORTED_OPTIMIZERS.extend(
        (*OPTIMIZERS.values(), torch.optim.SGD, baselines.Adagrad)
    )
    for name, scheduler in SCHEDULERS.items():
        setattr(modules["deepspeed.runtime.lr_schedules"], name, scheduler)
        modules["deepspeed.runtime.lr_schedules"].VALID_LR_SCHEDULES.append(name)
    wrap_engine(engine_class)
    deepspeed.initialize = checked(deepspeed.initialize)
    allow_no_max_grad_norm(modules["deepspeed.runtime.config"].DeepSpeedConfig)
    engine_class._largebatch_is_registered = True
    is_tested = deepspeed.__version__.split("+")[0] in TESTED_DEEPSPEED
    logger.info(
        "registered optimizers %s (in place of DeepSpeed's own Lamb) and schedulers %s with DeepSpeed %s (%s with %s)",
        ", ".join(cls.__name__ for cls in OPTIMIZERS.values()),
        ", ".join(SCHEDULERS),
        deepspeed.__version__,
        "tested" if is_tested else "NOT tested; tested",
        ", ".join(TESTED_DEEPSPEED),
    )


def check_internals(modules: dict[str, Any]) -> type:
    """The engine class, once everything that is going to be changed has been seen to exist."""
    import deepspeed

    missing = [
        f"{name}.{a}" for name, names in REQUIRED_INTERNALS.items() for a in names if not hasattr(modules[name], a)
    ]
    engine_class = getattr(modules["deepspeed.runtime.engine"], "DeepSpeedEngine", None)
    missing += [f"DeepSpeedEngine.{m}" for m in REQUIRED_ENGINE_METHODS if not hasattr(engine_class, m)]
    config_list = getattr(modules["deepspeed.runtime.config"], "DEEPSPEED_OPTIMIZERS", None)
    if config_list is not getattr(modules["deepspeed.runtime.engine"], "DEEPSPEED_OPTIMIZERS", None):
        missing.append("one DEEPSPEED_OPTIMIZERS list shared by config and engine")
    if missing:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)}, which largebatch extends; it is tested with "
            f"DeepSpeed {', '.join(TESTED_DEEPSPEED)}. Install one of these, or use largebatch.LARS and LAMB without register()"
        )
    return engine_class


def checked(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """deepspeed.initialize behind our checks."""
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def checked_initialize(*args, **kwargs):
        arguments = signature.bind_partial(*args, **kwargs).arguments
        is_ours = check_arguments(arguments, OPTIMIZERS)
        try:
            return initialize(*args, **kwargs)
        except Exception as error:
            if not is_ours or not is_answer(error):
                raise
            raise in_our_words(error) from error

    return checked_initialize


def allow_no_max_grad_norm(config_class: type) -> None:
    """Lets ``"max_grad_norm": null`` pass, which switches a preset's own clip off: DeepSpeed compares it with 0."""
    check = config_class._do_warning_check

    @functools.wraps(check)
    def _do_warning_check(self):
        given = self.optimizer_params
        if given is not None and given.get("max_grad_norm", 0) is None:
            self.optimizer_params = {name: value for name, value in given.items() if name != "max_grad_norm"}
        check(self)
        self.optimizer_params = given

    config_class._do_warning_check = _do_warning_check


def wrap_engine(engine_class: type) -> None:
    """Puts our hooks around the engine's methods."""
    configure_basic = engine_class._configure_basic_optimizer
    check_optimizer = engine_class._do_optimizer_sanity_check
    configure = engine_class._configure_optimizer
    load = loading_any_layout(engine_class.load_checkpoint)
    get_mom = engine_class.get_mom

    @functools.wraps(configure_basic)
    def _configure_basic_optimizer(self, model_parameters):
        if self.optimizer_name() == "adagrad" and not self.zero_use_cpu_optimizer():
            return baselines.Adagrad(model_parameters, **(self.optimizer_params() or {}))
        optimizer_class = OPTIMIZERS.get(self.optimizer_name())
        if optimizer_class is None:
            return configure_basic(self, model_parameters)
        return optimizer_class.from_json_params(model_parameters, self.optimizer_params() or {}, model=self.module)

    @functools.wraps(check_optimizer)
    def _do_optimizer_sanity_check(self, basic_optimizer):
        if isinstance(basic_optimizer, LayerwiseOptimizer):
            refuse_what_is_not_exact(self, basic_optimizer)
            basic_optimizer.name_layers(self.module)
            basic_optimizer.await_layout()
        else:
            refuse_what_replaced_ours(basic_optimizer)
        return check_optimizer(self, basic_optimizer)

    @functools.wraps(configure)
    def _configure_optimizer(self, client_optimizer, model_parameters):
        configure(self, client_optimizer, model_parameters)
        if isinstance(self.basic_optimizer, LayerwiseOptimizer):
            self.basic_optimizer.attach(read_layout(self.optimizer), read_cuts(self))
            loss_scale.repair(self)
            log_exclusions(self.basic_optimizer)
        elif type(self.basic_optimizer) in baselines.BASELINES:
            baselines.undo_first_step(self)
            loss_scale.repair(self)

    @functools.wraps(load)
    def load_checkpoint(self, *args, **kwargs):
        result = load(self, *args, **kwargs)
        if isinstance(getattr(self, "basic_optimizer", None), LayerwiseOptimizer):
            self.basic_optimizer.restore_configuration()
        return result

    @functools.wraps(get_mom)
    def momentum_or_betas(self):
        if isinstance(getattr(self, "basic_optimizer", None), LARS):
            return self._get_optimizer_param("momentum")
        return get_mom(self)

    engine_class.get_mom = momentum_or_betas
    engine_class._configure_basic_optimizer = _configure_basic_optimizer
    engine_class._do_optimizer_sanity_check = _do_optimizer_sanity_check
    engine_class._configure_optimizer = _configure_optimizer
    engine_class.save_checkpoint = saving_layout(engine_class.save_checkpoint)
    engine_class.load_checkpoint = load_checkpoint


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
    if engine.zenflow:
        raise ValueError(
            f"zero_optimization.zenflow is on; it splits layers in a way that {name} does not know. Remove it"
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


def show_log() -> None:
    """Gives the package's logger an output on rank 0, unless the program has set up logging itself."""
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[largebatch] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
