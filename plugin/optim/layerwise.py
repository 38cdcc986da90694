"""The one step loop of all layer-wise optimizers: local pass, sums, one all-reduce, trust ratios, local pass."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.config import (
    LEARNING_RATE,
    CommonOptions,
    GlobalOptions,
    UnknownOptionError,
    advice_on,
    check_option_names,
    check_preset,
    nearest_hint,
)
from largebatch.exclusion import LayerPolicy
from largebatch.kernels import dispatch
from largebatch.kernels.interface import ALGORITHMS, LayerFigures, Segments
from largebatch.kernels.reference import compute_dtype
from largebatch.layer_map.dtensor import local_part
from largebatch.layer_map.partition import Partition
from largebatch.optim.calls import Call, sums_over_ranks
from largebatch.optim.layer_table import LayerTable
from largebatch.optim.plan import GroupPlan, plan_group
from largebatch.optim.state import (
    STATE_DTYPES,
    check_is_own,
    check_same_meaning,
    dtype_of,
    fill_state,
    has_checkpoint_names,
    needs_step,
    new_states,
    state_dtype_of,
    with_checkpoint_names,
    with_own_names,
)
from largebatch.rules.rule import Rule
from largebatch.telemetry import LayerStats, merged

logger = logging.getLogger("largebatch")


def on_first_use(count: Tensor | None, device: torch.device) -> Tensor:
    """A 0-dim int64 counter on the device: the given one, or a new one at zero."""
    return torch.zeros((), dtype=torch.int64, device=device) if count is None else count.to(device)


ALL_BUT_EQUAL = 0.85
"""difflib's ratio from which a name is taken for a misspelt one: "weight_dcay", "beta", "Momentum"; not "weight_decay_mult"."""

GLOBAL_OPTIONS = tuple(field.name for field in fields(GlobalOptions))


def option_names(init: Callable[..., None]) -> list[str]:
    """The options among a constructor's parameters."""
    return [name for name in inspect.signature(init).parameters if name not in ("self", "params", "model")]


def rule_of(rule_class: type[Rule], options: Any) -> Rule:
    """A rule with those of the options that it has."""
    return rule_class(**{field.name: getattr(options, field.name) for field in fields(rule_class)})


def fills_from_preset(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates a constructor so that ``preset=`` supplies the options that the caller did not name."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        given = {name: value for name, value in kwargs.items() if name not in ("params", "model")}
        check_option_names(given, option_names(init), type(self).__name__)
        bound = signature.bind(self, *args, **kwargs)
        preset = self._preset = bound.arguments.get("preset")
        if preset is not None:
            check_preset(preset, list(self.presets), type(self).__name__)
            for name, value in self.presets[preset].items():
                bound.arguments.setdefault(name, value)
        return init(*bound.args, **bound.kwargs)

    return wrapped


def as_a_whole(step: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates step() so that torch.compile calls it and does not look inside, where it would take addresses for constants.

    The hooks that torch puts around a step lie inside, too; a mark tells torch that they are there. Under ``fullgraph=True``,
    which allows nothing that is not in the graph, torch raises and shows the reason given here.
    """
    has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.7 on
    reason = (
        {"reason": "a step of largebatch runs kernels of its own; compile forward and backward"} if has_reason else {}
    )
    hooked = torch.compiler.disable(torch.optim.Optimizer.profile_hook_step(step), **reason)
    hooked.hooked = True
    return hooked


def are_one_step(calls: list[Call]) -> bool:
    """Whether one backend takes the step of all of them by itself, on one device."""
    first = calls[0]
    return first.kernels.takes_whole_steps and all(
        call.kernels is first.kernels and call.segments.device == first.segments.device for call in calls
    )


class LayerwiseOptimizer(torch.optim.Optimizer):
    """Base of LARS, LAMB, N-LAMB and NN-LAMB. Subclasses name a rule and its options; they do not override step().

    NaN and inf never enter weights or state. An element whose gradient is not finite keeps its moments; a layer that
    holds such an element, on any rank, keeps its weights in that step and is named in the log; other layers step. To
    drop the whole step instead, clip (the norm is then NaN, too) or use a loss scale. Nothing is counted as a step in
    which no layer moved. See :attr:`num_skipped_steps` and :attr:`num_skipped_layers`.
    """

    rule_class: ClassVar[type[Rule]]
    options_class: ClassVar[type[CommonOptions]]
    checkpoint_names: ClassVar[Mapping[str, str]] = {}
    """State name -> name in the checkpoints of a sharded engine, whose converters know Adam's names only."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    _step_supports_amp_scaling = True
    """torch.amp.GradScaler leaves the unscaling to step(), which does it where it reads the gradients anyway."""

    def __init__(self, params, options: dict[str, Any], model: nn.Module | None):
        self._for_all_groups = {name: options[name] for name in GLOBAL_OPTIONS} | {"preset": self._preset}
        global_options = GlobalOptions(**{name: options.pop(name) for name in GLOBAL_OPTIONS})
        options = vars(self.options_class(**options)).copy()
        self.max_grad_norm = global_options.max_grad_norm
        self.kernels = global_options.kernels
        self.state_dtype = global_options.state_dtype
        self.overwrite_grads = global_options.overwrite_grads
        self._table = LayerTable(
            model, global_options.exclude_from_adaptation, global_options.exclude_from_weight_decay
        )
        self._is_armed = True
        self._configured: list[dict[str, Any]] = []
        self._plans: dict[tuple[int, int, int], GroupPlan] = {}
        self._captured: list[Call] = []
        self._stats: dict[tuple[str, ...], LayerStats] = {}
        self._num_skipped: Tensor | None = None
        self._num_skipped_layers: Tensor | None = None
        self._is_built = False
        super().__init__(params, options)
        self._is_built = True
        if isinstance(
            self.defaults["lr"], Tensor
        ):  # the groups have the caller's tensor, into which a schedule may write
            self.defaults["lr"] = self.defaults["lr"].detach().clone()
        self._table.end_taking_in(self.param_groups)
        self._table.check_exclusions_match()

    @classmethod
    def from_json_params(cls, params, json_params: Mapping[str, Any], model: nn.Module):
        """Builds the optimizer from the ``optimizer.params`` of a ds_config.

        Raises:
            UnknownOptionError, TypeError, ValueError: naming ``optimizer.params``, the key, the value, what is allowed.
        """
        check_option_names(json_params, option_names(cls.__init__), "optimizer.params")
        has_default = inspect.signature(cls.__init__).parameters["lr"].default is not inspect.Parameter.empty
        if "lr" not in json_params and not has_default:
            raise ValueError(f"optimizer.params.lr is missing; {cls.__name__} has no default learning rate")
        try:
            return cls(params, model=model, **json_params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"optimizer.params: {error}") from error

    def make_rule(self, options: Any) -> Rule:
        """The rule of a param group."""
        return rule_of(self.rule_class, options)

    @staticmethod
    def check_rule(rule: Rule) -> None:
        """Raises if a rule that was just made treats layers as no cut allows; ours are known not to."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. Options given in the group are checked like the constructor's."""
        param_group = self._checked_group(param_group)
        if self._is_built and "lr" not in param_group and isinstance(self.defaults["lr"], Tensor):
            param_group["lr"] = self.defaults["lr"].clone()
        options = self._group_options(self.defaults | param_group)  # before anything is added
        self.check_rule(self.make_rule(options))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update(vars(options))
        parameters = group["params"]
        try:
            for i, parameter in enumerate(parameters):
                if parameter.is_complex():
                    raise TypeError(f"complex parameters are not supported; parameter {i} is {parameter.dtype}")
            self._table.add_group(parameters, group.get("param_names", [None] * len(parameters)))
            if self._is_built:  # else when all groups are there, since what shares a buffer may be in several
                self._table.end_taking_in(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()  # nothing is added by halves
            self._table.forget_groups_from(len(self.param_groups))
            raise

    def _checked_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A param group as the caller gave it, less options that hold for all groups, which wrappers put into each.

        Other keys are the caller's own, as torch allows them: "name", "initial_lr", "lr_scale".

        Raises:
            ValueError: such an option is another here than the optimizer's; or the learning rate is a tensor of no learning rate.
            UnknownOptionError: for a key that is all but spelt right, or an option of other optimizers, without effect here.
        """
        own, cls = dict(group), type(self).__name__
        if "model" in own:
            raise ValueError(f"model holds for all param groups together; give it to {cls} itself")
        for name in self._for_all_groups.keys() & own.keys():
            value = own.pop(name)
            if value != self._for_all_groups[name]:
                raise ValueError(
                    f"{name} holds for all param groups together; a group has {value!r} and {cls} {self._for_all_groups[name]!r}. "
                    f"Give it to {cls} itself"
                )
        known = [field.name for field in fields(self.options_class)]
        for name in own.keys() - {*known, "params", "param_names"}:
            hint = nearest_hint(name, known, nearness=ALL_BUT_EQUAL)
            if hint:
                raise UnknownOptionError(f"a param group has {name!r}, which {cls} does not know{hint}")
            advice = advice_on(name, own[name], known)
            if advice:
                raise UnknownOptionError(f"a param group has {name!r}, which {cls} does not know; {advice}")
        lr = (self.defaults | own).get("lr")
        if isinstance(lr, Tensor) and lr.numel() == 1 and lr.device.type == "cpu":
            LEARNING_RATE("lr", lr.item())  # afterwards nobody looks at it; on a GPU that would wait for the device
        return own

    def _group_options(self, group: dict[str, Any]) -> Any:
        return self.options_class(**{field.name: group[field.name] for field in fields(self.options_class)})

    # --- the step ---------------------------------------------------------------------------------------------------

    @as_a_whole
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        """Takes one optimizer step; see the class for what happens to gradients that are not finite.

        Args:
            closure: reevaluates the model and returns the loss (optional).

        Raises:
            RuntimeError: a gradient is sparse; or a tensor is neither a parameter nor a known partition of some.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            calls = self._calls()
            if calls:
                self._step(calls)
                self._keep_what_is_captured(calls)
        finally:
            for plan in self._plans.values():
                plan.let_gradients_go()
        return loss

    def _step(self, calls: list[Call]) -> None:
        found_inf = getattr(self, "found_inf", None)  # both set by torch.amp.GradScaler for the time of this call
        are_local = all(call.is_local for call in calls)
        # other ranks may have found none: where layers are cut, a NaN in the sums tells them
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf and are_local:
            self._count_skipped_step(found_inf)
            return
        self._check_can_clip(calls)
        factor = self._factor(found_inf, are_local)
        if are_local and are_one_step(calls):
            self._keep_figures(calls, self._whole_step(calls, factor))
            return
        grad_scale = self._clipped(calls, factor)
        if are_local and all(call.kernels.is_fused for call in calls):
            figures = [call.step_(grad_scale) for call in calls]
        else:
            self._prepare(calls, grad_scale)
            sums = sums_over_ranks(calls, [call.sums(grad_scale) for call in calls])
            figures = [call.advance_(s, grad_scale=grad_scale) for call, s in zip(calls, sums, strict=True)]
        self._keep_figures(calls, figures)
        self._count_step(calls, figures)

    def _whole_step(self, calls: list[Call], factor: Tensor | None) -> list[LayerFigures]:
        """By a backend that clips and counts on the device itself."""
        home = calls[0].segments.device
        self._num_skipped = on_first_use(self._num_skipped, home)
        self._num_skipped_layers = on_first_use(self._num_skipped_layers, home)
        return calls[0].kernels.whole_step_(
            [call.segments for call in calls],
            grad_scale=factor,
            max_grad_norm=self.max_grad_norm,
            num_skipped=self._num_skipped,
            num_skipped_layers=self._num_skipped_layers,
        )

    def _keep_figures(self, calls: list[Call], figures: list[LayerFigures]) -> None:
        for call, call_figures in zip(calls, figures, strict=True):
            call.keep(call_figures)
            # the latest goes to the end, so that a layer's older figures under another sorting are overruled
            self._stats.pop(call.names, None)
            self._stats[call.names] = LayerStats(call.names, call.segments.stats, call.segments.rule.figures())

    def _prepare(self, calls: list[Call], grad_scale: Tensor | None) -> None:
        """Finds what some rules have to know of whole layers before their state is renewed."""
        calls = [call for call in calls if call.needs_norms_before or call.segments.rule.layer_state]
        with_norms = [call for call in calls if call.needs_norms_before]
        sums = sums_over_ranks(with_norms, [call.sums_before(grad_scale) for call in with_norms])
        of_call = dict(zip(map(id, with_norms), sums, strict=True))
        for call in calls:
            call.decide_before(of_call.get(id(call)))

    def _keep_what_is_captured(self, calls: list[Call]) -> None:
        """A CUDA graph reads the calls' tables at every replay, also when this optimizer has planned anew since."""
        on_cuda = [call for call in calls if call.segments.device.type == "cuda"]
        if on_cuda and torch.cuda.is_current_stream_capturing():
            self._captured += [call for call in on_cuda if not any(call is kept for kept in self._captured)]

    def _calls(self) -> list[Call]:
        """The calls of this step; those of the last one if only gradients and learning rates are new."""
        if not self._is_armed:
            for group in self.param_groups:
                for tensor in group["params"]:
                    if tensor.grad is not None:
                        self._state_of(tensor, self.make_rule(self._group_options(group)))
            return []
        calls = []
        for group in self.param_groups:
            # an engine may step its groups one by one, or put one flat tensor after another into the same group
            params = group["params"]
            key = (id(group), len(params), id(params[0]) if params else 0)
            plan = self._plans.get(key)
            if plan is None or plan.group is not group or not plan.renew(self.state):
                names = tuple(field.name for field in fields(self.options_class) if field.name != "lr")
                self._plans[key] = plan = plan_group(
                    group, names, self._options_and_rule, self._calls_of_group, self.state
                )
                plan.renew(self.state)
            calls.extend(plan.calls)
        return calls

    def _options_and_rule(self, group: dict[str, Any]) -> tuple[Any, Rule]:
        options = self._group_options(group)
        return options, self.make_rule(options)

    def _calls_of_group(self, group: dict[str, Any]) -> list[Call]:
        """Sorts the tensors that have gradients by device, dtype and process group."""
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        layers = self._table.layers_of_group(index, group["params"], self.state)
        options, rule = self._options_and_rule(group)
        calls: dict[Any, Call] = {}
        fresh = [tensor for tensor in group["params"] if tensor.grad is not None and not self.state.get(tensor)]
        self.state.update(zip(fresh, new_states(fresh, rule, self.state_dtype), strict=True))
        for position, tensor in enumerate(group["params"]):
            if tensor.grad is None:
                # ranks must enter the all-reduce together, so an engine gives its partitions zeros instead
                partition = self._table.partitions.get(tensor)
                assert partition is None or partition.process_group is None
                continue
            if local_part(tensor.grad).layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; use a dense embedding")
            layout = self._table.layout_of(tensor, layers[position])
            state = self._state_of(tensor, rule, len(layout.policies))
            is_rounded = any(state[name].dtype == torch.bfloat16 for name in rule.elementwise_state)
            if is_rounded and self._table.is_cut_itself(tensor):
                raise RuntimeError(
                    "state_dtype is 'bf16' and a parameter is cut by tensor parallelism or FSDP; the random bits of the "
                    "rounding would depend on the cut. Set state_dtype to 'fp32'"
                )
            dtype = compute_dtype(tensor.dtype)
            # what has no part elsewhere is stepped at once
            is_whole = not any(layout.process_groups)
            # kernels take memory as it is, which does not hold the values of a lazily negated weight
            is_odd = tensor.is_neg() or (tensor.dtype == torch.float64) != (tensor.grad.dtype == torch.float64)
            key = (tensor.device, tensor.dtype, tensor.grad.dtype, is_whole, is_odd)
            if key not in calls:
                if is_odd and self.kernels not in ("auto", "reference"):
                    raise RuntimeError(
                        f"kernels is {self.kernels!r}, and {layout.policies[0].name} is a lazily negated view or mixes fp64 with another "
                        "dtype, which only 'reference' can step; set kernels to that or to 'auto'"
                    )
                kernels = dispatch.choose_for(type(rule), tensor.device.type, "reference" if is_odd else self.kernels)
                calls[key] = Call(Segments(rule, tensor.device, dtype), kernels)
                # an engine's gradient buffers are its own and die with the step
                is_engines = all(t in self._table.partitions for t in group["params"])
                calls[key].segments.may_overwrite_grads = self.overwrite_grads or is_engines
            calls[key].add(position, tensor, state, layout, options)
        for call in calls.values():
            earlier = self._stats.get(call.names)
            is_alike = earlier is not None and earlier.rows == call.segments.rule.figures()
            call.segments.stats = earlier.figures.to(call.segments.device) if is_alike else None
        return list(calls.values())

    def _factor(self, found_inf: Tensor | None, are_local: bool) -> Tensor | None:
        """0-dim fp64 factor that takes all gradients out of the loss scale; None for 1.

        NaN where a GradScaler has found an overflow on the device, so that no layer moves and nobody has to wait, or on
        one of several ranks that share layers, so that none of them moves.
        """
        scale = getattr(self, "grad_scale", None)
        factor = None if scale is None else scale.double().reciprocal()
        if found_inf is not None and (found_inf.device.type != "cpu" or not are_local):
            factor = torch.where(found_inf > 0, torch.nan, 1.0 if factor is None else factor).double()
        return factor

    def _check_can_clip(self, calls: list[Call]) -> None:
        if self.max_grad_norm is not None and any(any(call.process_groups) for call in calls):
            raise RuntimeError(
                f"max_grad_norm={self.max_grad_norm} needs the norm of all gradients, and here they come in parts; set "
                'max_grad_norm to null (None) and DeepSpeed\'s "gradient_clipping" to the value, or, with FSDP, call '
                "torch.nn.utils.clip_grad_norm_ before step()"
            )

    def _clipped(self, calls: list[Call], factor: Tensor | None) -> Tensor | None:
        """0-dim fp64: the factor of all gradients, made smaller so that their norm is at most max_grad_norm (NVLAMB's pre-clip)."""
        if self.max_grad_norm is None:
            return factor
        home = calls[0].segments.device
        norm = torch.stack([c.kernels.grad_square_sum(c.segments).to(home) for c in calls]).sum().sqrt()
        norm = norm if factor is None else norm * factor.to(home)
        clip = self.max_grad_norm / norm.clamp(min=self.max_grad_norm)
        return clip if factor is None else clip * factor.to(home)

    def _count_step(self, calls: list[Call], figures: list[LayerFigures]) -> None:
        """Counts a step in the state unless no layer moved, and what was left alone in the statistics."""
        if all(f.have_all_moved and call.policies for call, f in zip(calls, figures, strict=True)):
            for call in calls:
                call.kernels.count_(call.segments)
            return
        home = calls[0].segments.device
        if home.type == "cpu" and all(call.segments.device == home for call in calls):
            self._count_step_on_cpu(calls, figures)
            return
        has_moved = torch.stack([f.is_finite.any().to(home) for f in figures]).any()
        self._count_skipped_step(~has_moved)
        num_skipped = sum((~f.is_finite).sum().to(home) for f in figures)
        self._num_skipped_layers = on_first_use(self._num_skipped_layers, home).add_(num_skipped)
        for call in calls:
            if call.segments.steps:
                # alpha makes torch read the tensor on the device; without it, torch waits for the value
                torch._foreach_add_(call.segments.steps, has_moved.to(call.segments.device, torch.float32), alpha=1.0)

    def _count_step_on_cpu(self, calls: list[Call], figures: list[LayerFigures]) -> None:
        bad = [
            policy.name
            for call, f in zip(calls, figures, strict=True)
            if not (f.have_all_moved or f.is_finite.all())
            for policy, is_good in zip(call.policies, f.is_finite.tolist(), strict=True)
            if not is_good
        ]
        has_moved = len(bad) < sum(len(call.policies) for call in calls)
        if bad:
            self._num_skipped_layers = on_first_use(self._num_skipped_layers, torch.device("cpu")).add_(len(bad))
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            what = "the other layers were" if has_moved else "no layer was"
            is_ours = all(type(call.segments.rule) in ALGORITHMS for call in calls)
            where = "the gradient" if is_ours else "the gradient, or in what the rule made of it"
            logger.warning(
                "%s left %s%s as they were: NaN or inf in %s; %s stepped",
                type(self).__name__,
                ", ".join(bad[:5]),
                more,
                where,
                what,
            )
        if not has_moved:
            self._count_skipped_step(torch.tensor(True))
            return
        for call in calls:
            call.kernels.count_(call.segments)

    def _count_skipped_step(self, is_skipped: Tensor) -> None:
        self._num_skipped = on_first_use(self._num_skipped, is_skipped.device)
        self._num_skipped.add_((is_skipped > 0).to(torch.int64).reshape(()))

    # --- observing --------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[LayerPolicy]:
        """Name and treatment of every layer, in the order of the param groups."""
        return self._table.policies

    @property
    def excluded_layers(self) -> list[LayerPolicy]:
        """The layers that are left out of adaptation, of weight decay, or of both."""
        return [policy for policy in self.layers if not (policy.is_adapted and policy.is_decayed)]

    @property
    def num_skipped_steps(self) -> int:
        """Calls of step() in which no layer moved, because of NaN or inf everywhere or a scaler's verdict. Waits for the device."""
        return 0 if self._num_skipped is None else int(self._num_skipped)

    @property
    def num_skipped_layers(self) -> int:
        """How often a layer was left alone because of NaN or inf in its gradient. Waits for the device."""
        return 0 if self._num_skipped_layers is None else int(self._num_skipped_layers)

    def layer_stats(self) -> dict[str, dict[str, float]]:
        """{layer name: {weight_norm, direction_norm, trust_ratio, local_lr, weight_decay}} of the last step; a rule may have more.

        Waits for the device. Complete on every rank, whatever the sharding. Empty before the first step.
        """
        return merged(self._stats.values())

    def layer_stats_on_device(self) -> list[LayerStats]:
        """What :meth:`layer_stats` shows, copied on the device without waiting for it; for :func:`telemetry.merged` later."""
        return [stats._replace(figures=stats.figures.clone()) for stats in self._stats.values()]

    # --- engines ----------------------------------------------------------------------------------------------------

    def name_layers(self, model: nn.Module) -> None:
        """Learns names and module types from a model, for those parameters that have none yet."""
        self._table.learn_names(model, self.param_groups)

    def await_layout(self) -> None:
        """Until :meth:`attach`, a step allocates state and does nothing else.

        An engine calls this before it replaces the parameters by flat tensors: some step an optimizer with zero
        gradients to make it allocate, which would decay the weights and count a step.
        """
        self._is_armed = False
        self._table.follow(self.param_groups)

    def attach(
        self, partitions: Mapping[Tensor, Partition], cut_over: Mapping[Tensor, dist.ProcessGroup] | None = None
    ) -> None:
        """Tells which layers the flat tensors hold that an engine put in the place of the parameters.

        Args:
            partitions: one entry for each tensor that ``step()`` may see and that is not a parameter itself.
            cut_over: parameters that are a part of a layer only (tensor parallelism) -> the ranks that hold its parts.
        """
        self._table.attach(partitions, cut_over or {}, self.param_groups)
        self._plans = {}
        self._is_armed = True
        fixed = [field.name for field in fields(self.options_class) if field.name != "lr"]
        self._configured = [{name: group[name] for name in fixed} for group in self.param_groups]

    def restore_configuration(self) -> None:
        """After an engine has loaded a checkpoint: the options of each param group, less lr, as they were built.

        The ds_config decides, not the checkpoint; and DeepSpeed's universal checkpoints give the options of the first
        group to all groups of stage 3.
        """
        for i, (group, configured) in enumerate(zip(self.param_groups, self._configured, strict=True)):
            for name, value in configured.items():
                if group.get(name, value) != value:
                    logger.info("param group %d: %s is %r as configured, not %r as loaded", i, name, value, group[name])
                group[name] = value

    # --- state ------------------------------------------------------------------------------------------------------

    def _state_of(self, tensor: Tensor, rule: Rule, num_layers: int | None = None) -> dict[str, Tensor]:
        state = self.state[tensor]
        if has_checkpoint_names(state, self.checkpoint_names):  # an engine has put a checkpoint's state here
            has_step = needs_step(rule, state_dtype_of(tensor, self.state_dtype))
            self.state[tensor] = state = with_own_names(state, self.checkpoint_names, has_step=has_step)
        fill_state(state, tensor, rule, self.state_dtype, num_layers)
        return state

    def allocate_state(self, tensor: Tensor, group: dict[str, Any], num_layers: int) -> dict[str, Tensor]:
        """The state of a tensor that step() will see, made if it is not there; for whoever fills it in from elsewhere.

        Args:
            num_layers: in the tensor.
        """
        self._plans = {}
        return self._state_of(tensor, self.make_rule(self._group_options(group)), num_layers)

    def state_dict(self) -> dict[str, Any]:
        """See torch.optim.Optimizer. Under a sharded engine, with the state names that its converters know."""
        state_dict = super().state_dict()
        if self._table.partitions and self.checkpoint_names:
            renamed = {i: with_checkpoint_names(s, self.checkpoint_names) for i, s in state_dict["state"].items()}
            state_dict["state"] = renamed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. Accepts the state names of a sharded engine's checkpoints, too.

        Options that the saved groups lack, as those of an older version do, stay as they are here.

        Raises:
            ValueError: the state is another optimizer's, or was made under a formula in which the same buffer means something
                else.
        """
        given: dict[str, Any] = {}

        def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            given.update(self._as_own_state_dict(state_dict))
            return given

        # inside the hooks of others: after those that change what is loaded, before those that look at what was loaded
        hooks = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(lambda _: self._restore_dtypes(given), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._plans = {}

    def _as_own_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict under our own names, with all options, once it is seen to be of this kind of optimizer."""
        names, groups = self.checkpoint_names, state_dict["param_groups"]
        options = [field.name for field in fields(self.options_class)]
        rules = [self.make_rule(self._group_options(group)) for group in self.param_groups]
        check_is_own(state_dict, names, rules, options, type(self))
        check_same_meaning(groups, self.param_groups)
        here = [{name: group[name] for name in options} for group in self.param_groups]
        saved_ids = {i for group in groups for i in group["params"]}
        has_step = any(needs_step(rule, STATE_DTYPES[self.state_dtype]) for rule in rules)
        states = {
            i: with_own_names(state, names, has_step=has_step)
            if i in saved_ids and has_checkpoint_names(state, names)
            else state
            for i, state in state_dict["state"].items()
        }
        if len(groups) == len(here):  # else torch says what is wrong
            groups = [own | saved for own, saved in zip(here, groups, strict=True)]
        return state_dict | {"state": states, "param_groups": groups}

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """torch casts state to the dtype of the parameter; ours is fp32 under bf16 and fp16 parameters."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for saved_id, tensor in zip(saved_ids, tensors, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    dtype = dtype_of(name, tensor, self.state_dtype)
                    self.state[tensor][name] = value.to(tensor.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "kernels", "state_dtype", "overwrite_grads", "_table", "_is_armed", "_configured")
        own += ("_is_built", "_for_all_groups", "_num_skipped", "_num_skipped_layers")
        fresh = {"_stats": {}, "_plans": {}, "_captured": []}
        return super().__getstate__() | {name: getattr(self, name) for name in own} | fresh
