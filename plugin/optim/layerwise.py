"""The one step loop of all layer-wise optimizers: local pass, sums, one all-reduce, trust ratios, local pass."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.config import GlobalOptions, SharedOptions, check_option_names, check_preset
from largebatch.exclusion import KINDS, LayerPolicy, ParameterIdentity, identities, policy_of
from largebatch.kernels import dispatch
from largebatch.kernels.interface import Segments
from largebatch.kernels.reference import compute_dtype
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.reduce import all_reduce_sums_
from largebatch.layer_map.segment import LayerMap, whole_layer
from largebatch.rules.rule import Rule
from largebatch.telemetry import LayerStats

logger = logging.getLogger("largebatch")

GLOBAL_OPTIONS = tuple(field.name for field in fields(GlobalOptions))


def fills_from_preset(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates a constructor so that ``preset=`` supplies the options that the caller did not name."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        known = [name for name in signature.parameters if name not in ("self", "params", "model")]
        check_option_names(
            {k: v for k, v in kwargs.items() if k not in ("params", "model")}, known, type(self).__name__
        )
        bound = signature.bind(self, *args, **kwargs)
        preset = bound.arguments.get("preset")
        if preset is not None:
            check_preset(preset, list(self.presets), type(self).__name__)
            for name, value in self.presets[preset].items():
                bound.arguments.setdefault(name, value)
        return init(*bound.args, **bound.kwargs)

    return wrapped


@dataclass
class Call:
    """Everything one kernel call of a step works on: tensors of one param group on one device with one dtype."""

    segments: Segments
    options: SharedOptions
    device: torch.device
    dtype: torch.dtype
    process_group: dist.ProcessGroup | None
    policies: list[LayerPolicy]
    tensors: list[Tensor]


class LayerwiseOptimizer(torch.optim.Optimizer):
    """Base of LARS, LAMB, N-LAMB and NN-LAMB. Subclasses name a rule and its options; they do not override step().

    A step changes nothing unless every layer's sums are finite on every rank that shares its layers: a NaN or inf in
    any gradient leaves weights, state and step counts as they were, and counts in :attr:`num_skipped_steps`.
    """

    options_class: ClassVar[type[SharedOptions]]
    checkpoint_names: ClassVar[Mapping[str, str]] = {}
    """State name -> name in the checkpoints of a sharded engine, whose converters know Adam's names only."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    def __init__(self, params, options: dict[str, Any], model: nn.Module | None):
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        global_options = GlobalOptions(**{name: options.pop(name) for name in GLOBAL_OPTIONS})
        self.options_class(**options)
        self.max_grad_norm = global_options.max_grad_norm
        self.exclude_from_adaptation = tuple(global_options.exclude_from_adaptation)
        self.exclude_from_weight_decay = tuple(global_options.exclude_from_weight_decay)
        self.kernels = global_options.kernels
        self._identities: dict[Tensor, ParameterIdentity] = identities(model) if model is not None else {}
        self._policies: dict[Tensor, LayerPolicy] = {}
        self._partitions: dict[Tensor, Partition] = {}
        self._is_armed = True
        self._configured: list[dict[str, Any]] = []
        self._stats: dict[int, LayerStats] = {}
        self._num_skipped: Tensor | None = None
        super().__init__(params, options)
        self._check_exclusions_match()

    @classmethod
    def from_json_params(cls, params, json_params: Mapping[str, Any], model: nn.Module):
        """Builds the optimizer from the ``optimizer.params`` of a ds_config.

        Raises:
            UnknownOptionError, TypeError, ValueError: naming ``optimizer.params.<key>``, the value and what is allowed.
        """
        known = [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "params", "model")]
        check_option_names(json_params, known, "optimizer.params")
        if (
            "lr" not in json_params
            and inspect.signature(cls.__init__).parameters["lr"].default is inspect.Parameter.empty
        ):
            raise ValueError(f"optimizer.params.lr is missing; {cls.__name__} has no default learning rate")
        try:
            return cls(params, model=model, **json_params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"optimizer.params: {error}") from error

    def make_rule(self, options: Any) -> Rule:
        """The rule of a param group."""
        raise NotImplementedError

    # --- layers -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. Options given in the group are checked like the constructor's."""
        for name in GLOBAL_OPTIONS:
            if name in param_group:
                raise ValueError(f"{name} holds for all param groups together; give it to {type(self).__name__} itself")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._group_options(group)
        for i, parameter in enumerate(group["params"]):
            if parameter.is_complex():
                raise TypeError(f"complex parameters are not supported; parameter {i} is {parameter.dtype}")
            if "param_names" in group:
                named = ParameterIdentity(group["param_names"][i])
                self._identities.setdefault(parameter, named)
            self._set_policy(parameter, f"group{len(self.param_groups) - 1}.param{i}")

    def name_layers(self, model: nn.Module) -> None:
        """Learns names and module types from a model, for those parameters that have none yet."""
        for parameter, identity in identities(model).items():
            if parameter in self._policies and parameter not in self._identities:
                self._identities[parameter] = identity
                self._set_policy(parameter, identity.name)

    def _set_policy(self, parameter: Tensor, placeholder: str) -> None:
        self._policies[parameter] = policy_of(
            self._identities.get(parameter),
            placeholder,
            exclude_from_adaptation=self.exclude_from_adaptation,
            exclude_from_weight_decay=self.exclude_from_weight_decay,
        )

    def _check_exclusions_match(self) -> None:
        names = [policy.name for policy in self._policies.values()]
        for option in ("exclude_from_adaptation", "exclude_from_weight_decay"):
            for pattern in getattr(self, option):
                if pattern not in KINDS and not any(re.search(pattern, name) for name in names):
                    raise ValueError(
                        f"{option} has {pattern!r}, which matches no parameter name; the names are "
                        f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                    )

    @property
    def layers(self) -> list[LayerPolicy]:
        """Name and treatment of every layer, in the order of the param groups."""
        return list(self._policies.values())

    @property
    def excluded_layers(self) -> list[LayerPolicy]:
        """The layers that are left out of adaptation, of weight decay, or of both."""
        return [policy for policy in self.layers if not (policy.is_adapted and policy.is_decayed)]

    # --- engines ----------------------------------------------------------------------------------------------------

    def await_layout(self) -> None:
        """Until :meth:`attach`, a step allocates state and does nothing else.

        An engine calls this before it replaces the parameters by flat tensors: some step an optimizer with zero
        gradients to make it allocate, which would decay the weights and count a step.
        """
        self._is_armed = False

    def attach(self, partitions: Mapping[Tensor, Partition]) -> None:
        """Tells which layers the flat tensors hold that an engine put in the place of the parameters.

        Args:
            partitions: one entry for each tensor that ``step()`` may see and that is not a parameter itself.
        """
        for partition in partitions.values():
            for parameter in partition.parameters:
                assert parameter in self._policies, "a partition holds a parameter that this optimizer was not given"
        self._partitions = dict(partitions)
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

    def _layout_of(self, tensor: Tensor) -> tuple[LayerMap, list[LayerPolicy], dist.ProcessGroup | None]:
        partition = self._partitions.get(tensor)
        if partition is not None:
            return partition.layer_map, [self._policies[p] for p in partition.parameters], partition.process_group
        if tensor in self._policies:
            return whole_layer(tensor.numel()), [self._policies[tensor]], None
        raise RuntimeError(
            f"{type(self).__name__} was handed a tensor of {tensor.numel()} elements that is none of the parameters it "
            "was built with. A wrapper (DeepSpeed ZeRO, FSDP) has replaced them, and norms over what it hands out would "
            "not be the norms of layers. With DeepSpeed, call largebatch.register() before deepspeed.initialize()"
        )

    # --- the step ---------------------------------------------------------------------------------------------------

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
        calls = list(self._collect())
        if calls and self._is_armed:
            self._step(calls)
        return loss

    def _collect(self) -> Iterable[Call]:
        """Groups the tensors that have gradients by param group, device, dtype and process group."""
        num_rows = 0
        for group in self.param_groups:
            options = self._group_options(group)
            rule = self.make_rule(options)
            calls: dict[Any, Call] = {}
            for tensor in group["params"]:
                if tensor.grad is None:
                    # ranks must enter the all-reduce together, so an engine gives its partitions zeros instead
                    assert tensor not in self._partitions or self._partitions[tensor].process_group is None
                    continue
                if tensor.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients; use a dense embedding"
                    )
                state = self._state_of(tensor, rule)
                if not self._is_armed:
                    continue
                layer_map, policies, process_group = self._layout_of(tensor)
                dtype = compute_dtype(tensor.dtype)
                key = (tensor.device, dtype, process_group)
                if key not in calls:
                    segments = Segments(rule, options.lr)
                    calls[key] = Call(segments, options, tensor.device, dtype, process_group, [], [])
                call = calls[key]
                self._add_segments(call, tensor, state, layer_map, policies)
            for call in calls.values():
                call.segments.rows = [row + num_rows for row in call.segments.rows]
                num_rows += len(call.policies)
                yield call

    def _add_segments(
        self, call: Call, tensor: Tensor, state: dict[str, Tensor], layer_map: LayerMap, policies: list[LayerPolicy]
    ) -> None:
        segments, rule = call.segments, call.segments.rule
        first_row = len(call.policies)
        state_tensors = [state[name] for name in rule.elementwise_state]
        step = self._step_number(state, tensor.device) if rule.counts_steps else 0.0
        is_whole = tensor not in self._partitions or layer_map.layer_numels == (tensor.numel(),)
        for segment in layer_map.segments:
            cut = (lambda t: t) if is_whole else (lambda t, s=segment: t.narrow(0, s.start, s.numel))
            segments.weights.append(cut(tensor.detach()))
            segments.grads.append(cut(tensor.grad))
            segments.states.append(tuple(cut(t) for t in state_tensors))
            segments.steps.append(step)
            segments.weight_decays.append(coupled_weight_decay(call.options, policies[segment.layer]))
            segments.rows.append(first_row + segment.layer)
        call.policies.extend(policies)
        call.tensors.append(tensor)

    def _step(self, calls: list[Call]) -> None:
        """Sums, one all-reduce, trust ratios, new weights."""
        backends = [dispatch.choose(call.device.type, self.kernels) for call in calls]
        grad_scale = self._clip_scale(calls, backends)
        sums = self._layer_sums(calls, backends, grad_scale)
        is_finite = torch.isfinite(sums).all()
        self._count_skipped(is_finite, sums, calls)
        norms = sums.sqrt()
        first_row = 0
        for call, kernels in zip(calls, backends, strict=True):
            rows = slice(first_row, first_row + len(call.policies))
            first_row = rows.stop
            call.segments.rows = [row - rows.start for row in call.segments.rows]
            self._advance_(call, kernels, norms[rows].to(call.device), grad_scale, is_finite.to(call.device))

    def _layer_sums(self, calls: list[Call], backends: list, grad_scale: Tensor | None) -> Tensor:
        """[num_layers, 2] fp64 sums of squares over whole layers: weights and direction, on the first call's device."""
        home = calls[0].device
        sums = torch.zeros(sum(len(call.policies) for call in calls), 2, dtype=torch.float64, device=home)
        for call, kernels in zip(calls, backends, strict=True):
            if call.segments.rows:
                scale = None if grad_scale is None else grad_scale.to(call.device)
                # a layer has at most one segment in a partition, so no row is written twice
                sums[call.segments.rows] = kernels.direction_square_sums(call.segments, grad_scale=scale).to(home)
        first_row = 0
        pieces, groups = [], []
        for call in calls:
            pieces.append(sums[first_row : first_row + len(call.policies)])
            groups.append(call.process_group)
            first_row += len(call.policies)
        distinct = list(dict.fromkeys(groups))
        if distinct == [None]:
            return sums
        for process_group in distinct:
            mine = [piece for piece, g in zip(pieces, groups, strict=True) if g is process_group]
            reduced = all_reduce_sums_(torch.cat(mine), process_group)
            for piece, part in zip(mine, reduced.split([len(piece) for piece in mine]), strict=True):
                piece.copy_(part)
        return sums

    def _advance_(self, call: Call, kernels, norms: Tensor, grad_scale: Tensor | None, is_finite: Tensor) -> None:
        options, rule, lr = call.options, call.segments.rule, call.segments.lr
        weight_norm, direction_norm = norms.unbind(1)
        decoupled, shrinkage = None, None
        if options.decoupled_weight_decay and options.weight_decay:
            decoupled = norms.new_tensor([options.weight_decay * p.is_decayed for p in call.policies])
            shrinkage = 1 - lr * decoupled
            weight_norm = weight_norm * shrinkage.abs()
        weight_decay = norms.new_tensor([coupled_weight_decay(options, p) for p in call.policies])
        adapted = torch.tensor([is_adapted(options, p) for p in call.policies], device=call.device)
        ratio = rule.trust_ratio(weight_norm, direction_norm, lr=lr, weight_decay=weight_decay)
        ratio = torch.where(adapted, ratio, 1.0).to(call.dtype)
        weight_decay = rule.weight_decay_in_force(weight_norm, direction_norm, weight_decay)
        kernels.advance_(
            call.segments,
            grad_scale=None if grad_scale is None else grad_scale.to(call.device),
            ratios=ratio,
            weight_decays=weight_decay,
            shrinkage=shrinkage,
            is_finite=is_finite,
        )
        if rule.counts_steps:
            for tensor in call.tensors:
                # replaced, not changed in place: an engine may have loaded one tensor into several states
                step = self.state[tensor]["step"]
                self.state[tensor]["step"] = step + is_finite.to(step.device, step.dtype)
        names = tuple(policy.name for policy in call.policies)
        stats = LayerStats(names, weight_norm, direction_norm, ratio, lr * ratio, weight_decay)
        key = id(call.tensors[0])
        self._stats[key] = stats.unless(is_finite, self._stats.get(key))

    def _clip_scale(self, calls: list[Call], backends: list) -> Tensor | None:
        """0-dim fp64 factor that brings the global gradient norm down to max_grad_norm (NVLAMB's pre-clip)."""
        if self.max_grad_norm is None:
            return None
        if any(call.process_group is not None for call in calls):
            raise RuntimeError(
                f"max_grad_norm={self.max_grad_norm} needs the norm of all gradients, and a sharded engine hands them "
                'out in parts; set max_grad_norm to null and the engine\'s "gradient_clipping" to the value'
            )
        home = calls[0].device
        sums = [
            kernels.square_sums(call.segments.grads).sum().to(home)
            for call, kernels in zip(calls, backends, strict=True)
        ]
        norm = torch.stack(sums).sum().sqrt()
        return self.max_grad_norm / norm.clamp(min=self.max_grad_norm)

    def _count_skipped(self, is_finite: Tensor, sums: Tensor, calls: list[Call]) -> None:
        if self._num_skipped is None:
            self._num_skipped = torch.zeros((), dtype=torch.int64, device=is_finite.device)
        self._num_skipped = self._num_skipped + ~is_finite
        if is_finite.device.type == "cpu" and not is_finite:
            names = [policy.name for call in calls for policy in call.policies]
            bad = [names[i] for i in (~torch.isfinite(sums).all(dim=1)).nonzero().flatten().tolist()]
            logger.warning(
                "%s skipped a step: NaN or inf in %s%s; weights and state are unchanged",
                type(self).__name__, ", ".join(bad[:5]), f" and {len(bad) - 5} more" if len(bad) > 5 else "",
            )  # fmt: skip

    # --- observing --------------------------------------------------------------------------------------------------

    @property
    def num_skipped_steps(self) -> int:
        """Calls of step() that changed nothing because a sum was not finite. Waits for the device."""
        return 0 if self._num_skipped is None else int(self._num_skipped)

    def layer_stats(self) -> dict[str, dict[str, float]]:
        """{layer name: {weight_norm, direction_norm, trust_ratio, local_lr, weight_decay}} of the last step.

        Waits for the device. Complete on every rank, whatever the sharding. Empty before the first step.
        """
        merged: dict[str, dict[str, float]] = {}
        for stats in self._stats.values():
            merged.update(stats.as_dict())
        return merged

    # --- state ------------------------------------------------------------------------------------------------------

    def _group_options(self, group: dict[str, Any]) -> Any:
        return self.options_class(**{field.name: group[field.name] for field in fields(self.options_class)})

    def _state_of(self, tensor: Tensor, rule: Rule) -> dict[str, Tensor]:
        state = self.state[tensor]
        if any(name in state for name in self.checkpoint_names.values()):
            self.state[tensor] = state = self._with_own_names(state)  # an engine has put a checkpoint's state here
        if rule.counts_steps and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for name in rule.elementwise_state:
            if name not in state:
                dtype = compute_dtype(tensor.dtype)
                state[name] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)
        return state

    @staticmethod
    def _step_number(state: dict[str, Tensor], device: torch.device) -> float | Tensor:
        """t of the step being taken: a Python float on the CPU, elsewhere 0-dim fp64 on the device."""
        step = state["step"]
        if device.type == "cpu":
            return float(step) + 1
        return step.to(device, torch.float64) + 1

    def state_dict(self) -> dict[str, Any]:
        """See torch.optim.Optimizer. Under a sharded engine, with the state names that its converters know."""
        state_dict = super().state_dict()
        if self._partitions and self.checkpoint_names:
            state_dict["state"] = {i: self._with_checkpoint_names(s) for i, s in state_dict["state"].items()}
        return state_dict

    def _with_checkpoint_names(self, state: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed's universal checkpoints hold exp_avg, exp_avg_sq and step; what we lack costs four bytes."""
        renamed = {self.checkpoint_names.get(name, name): value for name, value in state.items()}
        for value in list(renamed.values()):
            renamed.setdefault("exp_avg_sq", value.new_zeros(()).expand(value.shape))
        renamed.setdefault("step", torch.zeros(()))
        return renamed

    def _with_own_names(self, state: dict[str, Any]) -> dict[str, Any]:
        return {own: state[other] for own, other in self.checkpoint_names.items() if other in state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. Accepts the state names of a sharded engine's checkpoints, too.

        Raises:
            ValueError: the state was made under a formula in which the same buffer means something else.
        """
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for name in ("formulation", "lr_in_momentum"):
                if name in group and saved.get(name, group[name]) != group[name]:
                    raise ValueError(
                        f"the saved momentum was made with {name}={saved[name]!r} and this optimizer has "
                        f"{name}={group[name]!r}; the buffers mean different things. Build it with {name}={saved[name]!r}"
                    )
        names = set(self.checkpoint_names.values())
        if names:
            renamed = {i: s if names.isdisjoint(s) else self._with_own_names(s) for i, s in state_dict["state"].items()}
            state_dict = state_dict | {"state": renamed}
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of the parameter; ours is fp32 under bf16 and fp16 parameters
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for saved_id, tensor in zip(saved_ids, tensors, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    dtype = torch.float32 if name == "step" else compute_dtype(tensor.dtype)
                    self.state[tensor][name] = value.to(tensor.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "exclude_from_adaptation", "exclude_from_weight_decay", "kernels", "_identities",
               "_policies", "_is_armed", "_num_skipped", "_configured")  # fmt: skip
        return super().__getstate__() | {name: getattr(self, name) for name in own} | {"_partitions": {}, "_stats": {}}


def coupled_weight_decay(options: SharedOptions, policy: LayerPolicy) -> float:
    """The weight decay that goes into the layer's direction: 0 if it is excluded or if decay is decoupled."""
    return options.weight_decay if policy.is_decayed and not options.decoupled_weight_decay else 0.0


def is_adapted(options: SharedOptions, policy: LayerPolicy) -> bool:
    """Whether the layer gets a trust ratio other than 1."""
    has_decay = options.weight_decay != 0 and policy.is_decayed
    return policy.is_adapted and (options.adapt_undecayed or has_decay)
