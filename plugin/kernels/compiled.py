"""Any rule through torch.compile, for rules without kernels of their own: each pass over a segment is one loop.

The formulas are the rule's, so the numbers are those of the reference kernels but for the order in which sums are taken. A
rule is traced once for each combination of dtypes, and each pass compiled twice, for short and for long segments. What is the
same for all elements of a layer (coefficients from the number of the step, the local learning rate) is taken out of the loops
and computed for all layers at once. So are the rule's options as far as they are numbers: a schedule may change them without
compiling anew.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from largebatch.kernels.interface import Before, Decisions, Segments, step_of_layers, uploaded
from largebatch.kernels.reference import ReferenceKernels, all_finite
from largebatch.rules.rule import Part, Rule

logger = logging.getLogger("largebatch")

SHORTEST = 2
"""Elements of a segment from which on it is compiled for; torch compiles 0 and 1 anew."""

LONG = 1 << 15
"""Elements of a segment from which on its loops are divided among threads."""

BLOCK_NUMEL = 1 << 18
"""Elements that one call takes at most. Compiled code that sums keeps the new state in buffers and then copies it; those of a
block are still in the caches."""

TRACED_NUMEL = 24


# --- the passes ---------------------------------------------------------------------------------------------------------


class PerLayer(NamedTuple):
    """What a pass knows of a layer, fp64 each: 0-dim within a pass, [num_layers] outside.

    Attributes:
        options: the rule's own numbers.
        are_open: not 0 where the layer may move.
    """

    options: tuple[Tensor, ...]
    step: Tensor
    weight_decay: Tensor
    grad_scale: Tensor
    are_open: Tensor
    norms_before: tuple[Tensor, ...] = ()
    layer_state: tuple[Tensor, ...] = ()
    lr: Tensor | None = None
    ratios: tuple[Tensor, ...] = ()
    shrinkage: Tensor | None = None


def part_of(weight: Tensor, grad: Tensor, states: tuple[Tensor, ...], known: PerLayer, dtype: torch.dtype) -> Part:
    return Part(
        weight.to(dtype),
        grad.to(dtype) * known.grad_scale,
        tuple(state.to(dtype) for state in states),
        known.step,
        known.weight_decay,
        tuple(norm.to(dtype) for norm in known.norms_before),
        tuple(value.to(dtype) for value in known.layer_state),
    )


def squares(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack([vector.double().square().sum() for vector in vectors])


def pass_before(rule: Rule, part: Part, weight: Tensor, states: tuple[Tensor, ...], known: PerLayer) -> Tensor:
    """[len(rule.norms_before)] fp64 sums of squares."""
    return squares(rule.vectors_before(part))


def first_pass(rule: Rule, part: Part, weight: Tensor, states: tuple[Tensor, ...], known: PerLayer) -> Tensor:
    """Renews the state, in place; [1 + len(rule.norms)] fp64 sums of squares."""
    is_finite = torch.isfinite(part.grad) & (known.are_open != 0)
    if rule.accumulates():
        fresh = rule.accumulate(part)
        is_finite = is_finite & all_finite(*fresh)
        fresh = tuple(torch.where(is_finite, new, old) for new, old in zip(fresh, part.state, strict=True))
        part = part._replace(state=stored(states, fresh))
    directions = [torch.where(is_finite, direction, torch.nan) for direction in rule.directions(part)]
    return squares((part.weight, *directions))


def second_pass(rule: Rule, part: Part, weight: Tensor, states: tuple[Tensor, ...], known: PerLayer) -> None:
    """Writes the new weights, and what of the state depends on the ratios, in place."""
    old_weight = part.weight
    part = part._replace(weight=old_weight * known.shrinkage)
    ratios = tuple(ratio.to(old_weight.dtype) for ratio in known.ratios)
    new_weight, new_states = rule.advance(part, lr=known.lr, ratios=ratios)
    is_written = all_finite(new_weight, *new_states) & (known.are_open != 0)
    weight.copy_(torch.where(is_written, new_weight, old_weight))
    if new_states is not part.state:
        stored(states, tuple(torch.where(is_written, n, old) for n, old in zip(new_states, part.state, strict=True)))


def stored(states: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for state, value in zip(states, values, strict=True):
        state.copy_(value)
    return values


# --- tracing ------------------------------------------------------------------------------------------------------------


def numbers_of(rule: Rule) -> tuple[float, ...]:
    """The options that are floats, or tuples of them, one after the other."""
    found: list[float] = []
    for field in fields(rule):
        value = getattr(rule, field.name)
        found += [value] if type(value) is float else list(value) if is_numbers(value) else []
    return tuple(found)


def is_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(type(v) is float for v in value)


def with_numbers(rule: Rule, numbers: Sequence[Tensor]) -> Rule:
    """The same rule with tensors in the place of :func:`numbers_of`; not checked as its options are."""
    rest, made = list(numbers), object.__new__(type(rule))
    for field in fields(rule):
        value = getattr(rule, field.name)
        if type(value) is float:
            value = rest.pop(0)
        elif is_numbers(value):
            value = tuple(rest.pop(0) for _ in value)
        object.__setattr__(made, field.name, value)
    return made


def structure_of(rule: Rule) -> tuple[Any, ...]:
    """What of a rule's options is compiled in: all that are no numbers."""
    values = [(f.name, getattr(rule, f.name)) for f in fields(rule)]
    return type(rule), *((n, len(v) if is_numbers(v) else "number" if type(v) is float else v) for n, v in values)


def flattened(known: PerLayer) -> list[Tensor]:
    return [t for value in known if value is not None for t in (value if isinstance(value, tuple) else (value,))]


def unflattened(tensors: Sequence[Tensor], like: PerLayer) -> PerLayer:
    rest = iter(tensors)
    values = [v if v is None else tuple(next(rest) for _ in v) if isinstance(v, tuple) else next(rest) for v in like]
    return PerLayer(*values)


@dataclass
class CompiledPass:
    """A pass in two parts.

    Attributes:
        of_layers: of all layers at once: tensors of :class:`PerLayer`, [num_layers] each -> those that the loop needs.
        loop: of one segment: weight, grad, the states (1-D), [number of those] fp64 of its layer -> what the pass returns.
        short_loop, long_loop: the same, compiled; the second for several threads.
        takes_options: whether the rule's numbers are among what it is given.
    """

    of_layers: Callable[..., tuple[Tensor, ...]]
    loop: Callable[..., tuple[Tensor | None]]
    short_loop: Callable[..., tuple[Tensor | None]]
    long_loop: Callable[..., tuple[Tensor | None]]
    takes_options: bool

    def __call__(self, vectors: Sequence[Tensor], row: Tensor, sums: Tensor) -> None:
        """Passes over a segment, block after block, and adds what the pass returns to ``sums``, if it returns anything."""
        is_short = vectors[0].numel() <= BLOCK_NUMEL
        for block in (vectors,) if is_short else zip(*(vector.split(BLOCK_NUMEL) for vector in vectors), strict=True):
            numel = block[0].numel()
            loop = self.loop if numel < SHORTEST else self.short_loop if numel < LONG else self.long_loop
            (found,) = loop(*block, row)
            if found is not None:
                sums += found

    def rows(self, known: PerLayer) -> Tensor:
        """[num_layers, number that the loop needs] fp64."""
        found = self.of_layers(*flattened(known))
        return torch.stack([value.double().expand_as(known.step) for value in found], dim=1)


def compiled_pass(
    function: Callable[..., Tensor | None], rule: Rule, known: PerLayer, vectors: list[Tensor], dtype: torch.dtype
) -> CompiledPass:
    """Traces a pass of a rule and compiles it.

    Args:
        known: of any layers; only which of its parts are there matters. With options, they are no constants.
        vectors: any weight, gradient and states, 1-D; written. dtype: of the arithmetic.
    """

    def run(vectors: list[Tensor], scalars: list[Tensor]) -> Tensor | None:
        given, (weight, grad, *states) = unflattened(scalars, known), vectors
        part = part_of(weight, grad, tuple(states), given, dtype)
        seen = with_numbers(rule, given.options) if given.options else rule
        return function(seen, part, weight, tuple(states), given)

    scalars = [torch.ones((), dtype=torch.float64, device=vectors[0].device) for _ in flattened(known)]
    traced = make_fx(run, tracing_mode="symbolic")(vectors, scalars)
    of_layers, loop = divided(traced, len(vectors))
    # torch compiles a graph for the sizes that it sees first, and looks for such code by graph and options
    short_loop = torch.compile(loop.forward, dynamic=True, fullgraph=True)
    options = {"cpp.min_chunk_size": LONG // 8}
    long_loop = torch.compile(copy.deepcopy(loop).forward, dynamic=True, fullgraph=True, options=options)
    made = CompiledPass(of_layers, loop.forward, short_loop, long_loop, bool(known.options))
    (row,) = made.rows(unflattened([scalar.reshape(1) for scalar in scalars], known))
    short_loop(*vectors, row)
    long_loop(*(vector.new_ones(BLOCK_NUMEL) for vector in vectors), row)
    return made


def is_of_layers(node: fx.Node, of_layers: set[fx.Node]) -> bool:
    """Whether a node computes a number from numbers of a layer alone."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or node.meta["val"].dim():
        return False
    is_elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in CASTS
    return is_elementwise and bool(node.all_input_nodes) and all(n in of_layers for n in node.all_input_nodes)


CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default)


def divided(traced: fx.GraphModule, num_vectors: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A traced pass, divided into what is of layers and what is of elements; see :class:`CompiledPass`."""
    nodes = list(traced.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    of_layers = set(placeholders[num_vectors:])
    for node in nodes:
        if is_of_layers(node, of_layers):
            of_layers.add(node)
    needed = [n for n in nodes if n in of_layers and any(user not in of_layers for user in n.users)]

    outer, copies = fx.Graph(), {}
    for node in nodes:
        if node in of_layers:
            copies[node] = outer.node_copy(node, copies.__getitem__)
    outer.output(tuple(copies[node] for node in needed))

    inner, copies = fx.Graph(), {}
    for node in placeholders[:num_vectors]:
        copies[node] = inner.node_copy(node)
    row = inner.placeholder("row")
    for i, node in enumerate(needed):
        value = inner.call_function(torch.ops.aten.select.int, (row, 0, i))
        copies[node] = inner.call_function(torch.ops.aten.to.dtype, (value, node.meta["val"].dtype))
    for node in nodes:
        if node not in of_layers and node.op != "placeholder":
            copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.lint()
    return fx.GraphModule(traced, outer), fx.GraphModule(traced, inner)


# --- the backend --------------------------------------------------------------------------------------------------------


class CompiledKernels(ReferenceKernels):
    """See :class:`largebatch.kernels.interface.Kernels`. bf16 state is stepped by the reference kernels."""

    name = "compiled"

    def __init__(self) -> None:
        self.passes: dict[tuple[Any, ...], CompiledPass | None] = {}
        """None: the rule cannot be traced so."""
        self.failed: set[tuple[Any, ...]] = set()

    def sums_before(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        sums = self.run(pass_before, segments, known_of(segments, grad_scale, None), len(segments.rule.norms_before))
        return super().sums_before(segments, grad_scale=grad_scale) if sums is None else sums

    def accumulate_(self, segments: Segments, *, grad_scale: Tensor | None, before: Before | None = None) -> Tensor:
        sums = self.run(first_pass, segments, known_of(segments, grad_scale, before), 1 + len(segments.rule.norms))
        return super().accumulate_(segments, grad_scale=grad_scale, before=before) if sums is None else sums

    def advance_(self, segments: Segments, *, grad_scale: Tensor | None, decisions: Decisions) -> None:
        known = known_of(segments, grad_scale, decisions.before)
        ones = torch.ones_like(known.step)
        known = known._replace(
            weight_decay=decisions.weight_decays,
            are_open=decisions.is_finite.double(),
            lr=ones * segments.lr,
            ratios=tuple(decisions.ratios.double()),
            shrinkage=ones if decisions.shrinkage is None else decisions.shrinkage,
        )
        if self.run(second_pass, segments, known, 0) is None:
            super().advance_(segments, grad_scale=grad_scale, decisions=decisions)

    def run(
        self, function: Callable[..., Tensor | None], segments: Segments, known: PerLayer, num_sums: int
    ) -> Tensor | None:
        """[num_layers, num_sums] of a pass over all segments; None if it is not compiled, and nothing has been done."""
        sums = torch.zeros(segments.num_layers, num_sums, dtype=torch.float64, device=segments.device)
        if not segments.spans:
            return sums
        vectors = [segments.weights[0].detach(), segments.grads[0], *segments.states[0]]
        found = self.pass_for(function, segments.rule, known, vectors, segments.dtype)
        if found is None:
            return None
        rows = found.rows(known if found.takes_options else known._replace(options=())).unbind()
        for span, weight, grad, states in segments.pieces():
            if span.numel:
                with InStorageOrder((weight, grad, *states)) as flats:
                    found(flats, rows[span.row], sums[span.row])
        return sums

    def pass_for(
        self,
        function: Callable[..., Tensor | None],
        rule: Rule,
        known: PerLayer,
        like: list[Tensor],
        dtype: torch.dtype,
    ) -> CompiledPass | None:
        """A pass that was compiled before, or is now; None if it cannot be."""
        if any(tensor.dtype == torch.bfloat16 for tensor in like[2:]):
            return None
        kinds = tuple(tensor.dtype for tensor in like), like[0].device
        key = (function, structure_of(rule), kinds)
        if key not in self.passes:
            self.passes[key] = self.attempt(function, rule, known, like, dtype)
        found = self.passes[key]
        if found is not None or key in self.failed:
            return found
        baked = (*key, numbers_of(rule))
        if baked not in self.passes:
            self.passes[baked] = self.attempt(function, rule, known._replace(options=()), like, dtype)
            if self.passes[baked] is None:
                self.failed.add(key)
        return self.passes[baked]

    def attempt(
        self,
        function: Callable[..., Tensor | None],
        rule: Rule,
        known: PerLayer,
        like: list[Tensor],
        dtype: torch.dtype,
    ) -> CompiledPass | None:
        """A pass compiled with or without the rule's numbers as constants; None if the rule cannot be traced so."""
        vectors = [torch.ones(TRACED_NUMEL, dtype=tensor.dtype, device=tensor.device) for tensor in like]
        try:
            return compiled_pass(function, rule, known, vectors, dtype)
        except Exception as error:  # whatever the rule, torch's tracer and its compilers raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            if known.options:
                logger.info("kernels: %s is compiled anew for other numbers in its options (%s)", rule.name, reason)
            else:
                logger.warning(
                    "kernels: %s is stepped by 'reference' (slower); it cannot be compiled: %s", rule.name, reason
                )
            return None


def known_of(segments: Segments, grad_scale: Tensor | None, before: Before | None) -> PerLayer:
    """What is known of the layers before the first pass."""
    device = segments.device
    step = step_of_layers(segments.steps, segments.rows, device)
    ones = torch.ones_like(step)
    return PerLayer(
        tuple(uploaded(numbers_of(segments.rule), torch.float64, device).unbind()),
        step,
        uploaded(segments.weight_decays, torch.float64, device),
        ones if grad_scale is None else ones * grad_scale,
        ones if before is None else before.is_finite.double(),
        () if before is None else tuple(before.norms.double()),
        () if before is None else tuple(before.layer_state.double()),
    )


class InStorageOrder:
    """Tensors of equal shapes as 1-D ones, as a context; such as are not all laid out alike are copied, and back at its end."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        first = tensors[0]
        if all(tensor.is_contiguous() for tensor in tensors):
            self.flats = [tensor.view(-1) for tensor in tensors]
        elif is_dense(first) and all(tensor.stride() == first.stride() for tensor in tensors):
            self.flats = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
        else:
            self.flats = [tensor.reshape(-1).clone() for tensor in tensors]
        self.are_copies = self.flats[0].data_ptr() != first.data_ptr()

    def __enter__(self) -> list[Tensor]:
        return self.flats

    def __exit__(self, *_: Any) -> None:
        if self.are_copies:
            weight, _, *states = self.tensors
            for tensor, flat in zip((weight, *states), (self.flats[0], *self.flats[2:]), strict=True):
                tensor.copy_(flat.view(tensor.shape))


def is_dense(tensor: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)


def probe(device: torch.device) -> None:
    """Compiles something. Raises whatever torch raises where it cannot."""
    torch.compile(lambda x: x + 1, dynamic=True, fullgraph=True)(torch.ones(TRACED_NUMEL, device=device))
