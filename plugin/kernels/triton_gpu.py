"""The kernels for CUDA tensors in Triton: two launches a step and call, whatever the number of layers; LANS and clipping add one each.

The kernels themselves are in triton_kernels; here are the tables in which they look things up, and their launches. No step waits
for the device. Learning rate, step counts, gradient scale and what is not finite stay there, and the kernels themselves count
steps and keep statistics. A step can be captured in a CUDA graph once it has been taken with the same tensors: whatever it
reads then stays where it is. Options that change later are written there, so that replays follow them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from largebatch.kernels.interface import (
    ALGORITHMS,
    DTYPE,
    SHAPE,
    Before,
    Decisions,
    LayerFigures,
    Segments,
    Span,
    upload_,
    uploaded,
)
from largebatch.kernels.triton_kernels import (
    BLOCK_BYTES,
    CHUNK_NUMEL,
    ROW_BLOCK,
    first_kernel,
    probe_kernel,
    second_kernel,
    square_kernel,
)
from largebatch.kernels.triton_rules import NUMBERS
from largebatch.rules.rule import Rule

logger = logging.getLogger("largebatch")

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


OF_LARS = ("momentum", "eps", "weight_norm_bounds", "trust_ratio_bounds")
OF_LAMB = ("betas", "eps", "bias_correction", "weight_norm_bounds", "trust_ratio_bounds")
OPTIONS: dict[str, tuple[str, ...]] = {
    "lars": (
        *OF_LARS, "trust_coefficient", "nesterov", "lr_in_momentum", "larc_clip", "decay_in_ratio", "decay_before_norm",
        "damp_ratio_by_momentum", "skip_zero_norm_layers",
    ),
    "lars2019": OF_LARS,
    "lamb": OF_LAMB,
    "nlamb": OF_LAMB,
    "nnlamb": OF_LAMB,
    "lans": ("betas", "eps", "weight_norm_bounds", "trust_ratio_bounds"),
}  # fmt: skip
"""Name of a rule -> the options that the kernels have formulas for."""


def options_of(rule: Rule) -> dict[str, Any]:
    """A rule's options by their names.

    Raises:
        KeyError: they are not those that the kernels know.
    """
    options = {field.name: getattr(rule, field.name) for field in fields(rule)}
    if set(options) != set(OPTIONS[rule.name]):
        raise KeyError(
            f"the Triton kernels know {sorted(OPTIONS[rule.name])} of {rule.name}, and it has {sorted(options)}"
        )
    return options


def numbers_of(rule: Rule) -> list[float]:
    """A rule's numbers in the order of triton_rules.NUMBERS; 0 for those that it does not have."""
    options = options_of(rule)
    found = {name: options[name] for name in ("eps", "momentum", "trust_coefficient") if name in options}
    if "betas" in options:
        found["beta1"], found["beta2"] = options["betas"]
        found |= {f"log_{n}": math.log(found[n]) if found[n] > 0 else 0.0 for n in ("beta1", "beta2")}
    found["norm_low"], found["norm_high"] = options["weight_norm_bounds"] or (0.0, 0.0)
    found["ratio_low"], found["ratio_high"] = options["trust_ratio_bounds"] or (0.0, 0.0)
    return [found.get(name, 0.0) for name in NUMBERS]


CORRECTIONS = {False: 0, True: 1, "lr": 2}


def switches_of_passes(rule: Rule) -> dict[str, Any]:
    """What both passes are compiled for."""
    return {"ALGORITHM": ALGORITHMS[type(rule)], "CORRECTS": CORRECTIONS[options_of(rule).get("bias_correction", True)]}


def switches_of_layers(rule: Rule) -> dict[str, Any]:
    """What the decisions on layers are compiled for."""
    options = options_of(rule)
    is_2017 = rule.name == "lars"
    return {
        "HAS_NORM_BOUNDS": options["weight_norm_bounds"] is not None,
        "HAS_RATIO_BOUNDS": options["trust_ratio_bounds"] is not None,
        "LARC_CLIP": is_2017 and options["larc_clip"],
        "DECAY_IN_RATIO": is_2017 and options["decay_in_ratio"] and not options["decay_before_norm"],
        "DAMPS": is_2017 and options["damp_ratio_by_momentum"],
        "SKIPS_ZERO_NORMS": is_2017 and options["skip_zero_norm_layers"],
    }


def row_table(segments: Segments) -> list[list[float]]:
    """[4, num_layers]: what the kernels know of each layer, see first_kernel."""
    rows = (segments.weight_decays, segments.seeds, segments.decoupled_weight_decays, segments.are_adapted)
    return [[float(x) for x in row] for row in rows]


def cut_into_chunks(numels: list[int]) -> tuple[list[int], list[int]]:
    """(owner, first element) of each chunk; without elements it is one that is empty."""
    owners, starts = [], []
    for owner, numel in enumerate(numels):
        for start in range(0, max(numel, 1), CHUNK_NUMEL):
            owners.append(owner)
            starts.append(start)
    return owners, starts


def block_numel(*dtypes: tl.dtype) -> int:
    """Elements of a block of arrays with these dtypes."""
    return BLOCK_BYTES * 8 // min(dtype.primitive_bitwidth for dtype in dtypes)


def with_a_span_each(segments: Segments) -> list[Span]:
    """The spans, and an empty one for each layer that has none here: a program looks at it, too."""
    found = {span.row for span in segments.spans}
    tensors = (tensor for tensor, num_rows in enumerate(segments.rows) for _ in range(num_rows))
    return segments.spans + [Span(t, 0, 0, row, 0) for row, t in enumerate(tensors) if row not in found]


def are_laid_out_alike(a: Tensor, b: Tensor) -> bool:
    """Whether equal indices lie at equal offsets. The stride of a dimension of size 1 says nothing about that."""
    if a.is_neg() or a._is_zerotensor():  # memory does not hold the values
        return False
    if a.stride() == b.stride():
        return True
    return all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches inside go to the device where the tensors are, which need not be the current one."""
    # in Triton's interpreter tensors lie in the host's memory
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(kernel: Any, num_programs: int, **arguments: Any) -> Callable[[], object]:
    """Launches a kernel; returns what launches it again with the same arguments.

    Triton looks at every argument of a launch to find the binary for it. The same arguments have the same binary, which is then
    launched without another look.
    """
    if num_programs == 0:
        return lambda: None
    grid = (num_programs, 1, 1)
    binary = kernel[grid](**arguments)
    if binary is None:  # in the interpreter
        return functools.partial(kernel[grid], **arguments)
    # from Triton 3.3 on constants are arguments of a binary, too
    names = [name for name in binary.src.fn.arg_names if name in binary.src.signature]
    return functools.partial(binary[grid], *(arguments[name] for name in names))


def probe(device: torch.device) -> None:
    """Compiles and launches a kernel of one store. Raises whatever Triton raises where it cannot."""
    x = torch.zeros((), device=device)
    with on(device):
        launch(probe_kernel, 1, x=x)


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def strides_of(tensors: Sequence[Tensor]) -> list[tuple[int, ...]] | None:
    """None if all are contiguous, which is seen faster than any stride."""
    return None if all(map(Tensor.is_contiguous, tensors)) else list(map(Tensor.stride, tensors))


def layouts_of(segments: Segments, grad_addresses: list[int]) -> Any:
    """What the memory of weights and gradients is beside where it lies; never the same if a gradient's does not hold its values."""
    if any(map(Tensor.is_neg, segments.grads)):
        return math.nan
    # nothing lies at 0 but tensors without elements, and zeros that are not in memory
    return grad_addresses.count(0), strides_of(segments.weights), strides_of(segments.grads)


@dataclass(eq=False)
class Tables:
    """What the programs of a call look up, on the device. Made at its first step; afterwards written in place."""

    chunks: Tensor
    """[2, num_chunks] int64: span, first element in it."""
    spans: Tensor
    """[4, num_spans] int64: elements, row, where it begins in its layer, tensor."""
    row_chunks: Tensor
    """[2, num_layers] int64: first chunk, end."""
    rows: Tensor
    """[4, num_layers] fp64, see row_table."""
    rule_options: Tensor
    """See numbers_of."""
    addresses: Tensor
    """[4 * num_spans + num_tensors] int64: of weights, gradients and both states; then of the step counts."""
    arrivals: Tensor
    """[num_layers + 1] int32, zeros before and after each launch."""
    sums: Tensor
    """[1 + len(rule.norms), num_chunks] fp64, written by the first pass."""
    before: Tensor
    """[3, num_layers] fp64, written with the sums of squares of the gradients; of rules without norms before of no use."""
    step_numbers: Tensor
    """[num_layers] fp64, written by the first pass."""
    decisions: Tensor
    """[2 + len(rule.ratios), num_layers] fp64, likewise."""
    moved: Tensor
    """[num_layers] bool, likewise."""
    lr: Tensor
    """0-dim fp64."""
    factor: Tensor
    """0-dim fp64: what a step multiplies the gradients by, before they are clipped."""
    clipped: Tensor
    """0-dim fp64: and afterwards; written by the square kernel."""
    max_norm: Tensor
    """0-dim fp64: what the gradients are clipped to."""
    one: Tensor
    """0-dim fp64: the gradient scale where there is none."""
    num_changes: int
    """Of the segments' options, that the tables know of."""
    starts: list[tuple[int, int]]
    """[num_spans] tensor, first element in it."""
    known: dict[int, list[int]] = field(default_factory=dict)
    """Column -> the addresses of its tensors that the device has."""
    known_lr: float | None = None
    known_max_norm: float | None = None
    regular: Any = None
    """See layouts_of; None if a tensor had to be copied."""
    copies: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(column, tensor) -> where an irregular tensor is copied in each step."""
    calls: tuple[list[list[int]], Tensor] | None = None
    """What the last of several calls knows of all of them, and that on the device; see second_kernel."""
    steps: tuple[Any, list[Callable[[], object]]] | None = None
    """Of the last of several calls: what the launches of a step depend on, and these launches."""
    warns_of_fixed_lr: bool = True

    @property
    def num_chunks(self) -> int:
        return self.chunks.shape[1]

    @property
    def num_spans(self) -> int:
        return self.spans.shape[1]


class TritonKernels:
    """See :class:`largebatch.kernels.interface.WholeStepKernels`."""

    name = "triton"
    is_fused = False
    takes_whole_steps = True

    def is_current(self, segments: Segments) -> bool:
        # what lies where it lay is on the device where it was
        layouts = [
            addresses_of(segments.weights),
            *(list(map(attribute, segments.weights)) for attribute in (DTYPE, SHAPE)),
        ]
        if segments.prepared.get("triton layouts") != layouts:
            segments.prepared["triton layouts"] = layouts
            if not segments.have_same_layout():
                return False
        segments.prepared["weights lie at"] = layouts[0]
        return True

    def count_(self, segments: Segments) -> None:
        if segments.steps:
            torch._foreach_add_(segments.steps, 1.0)

    def grad_square_sum(self, segments: Segments) -> Tensor:
        with FlatTensors(segments, self.tables(segments)) as flat, on(segments.device):
            self.squares(flat, flat.tables.one, torch.float64)
        return flat.tables.before[2].sum()

    def sums_before(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        with FlatTensors(segments, self.tables(segments)) as flat, on(segments.device):
            self.squares(flat, scale_of(flat.tables, grad_scale), segments.dtype)
        return flat.tables.before[2, :, None].clone()

    def accumulate_(self, segments: Segments, *, grad_scale: Tensor | None, before: Before | None = None) -> Tensor:
        tables = self.tables(segments)
        if before is not None:
            (norm,) = before.norms.double()
            divisor = torch.where(before.is_finite, torch.where(norm > 0, norm, 1.0), torch.nan)
            tables.before.copy_(torch.stack([divisor, norm, norm.square()]))
        num_sums = 1 + len(segments.rule.norms)
        sums = torch.empty(segments.num_layers, num_sums, dtype=torch.float64, device=segments.device)
        with FlatTensors(segments, tables) as flat, on(segments.device):
            self.first(flat, scale_of(tables, grad_scale), sums, sums)
        return sums

    def advance_(self, segments: Segments, *, grad_scale: Tensor | None, decisions: Decisions) -> None:
        (ratios, *others), decay, shrinkage = decisions.ratios.double(), decisions.weight_decays, decisions.shrinkage
        shrinkage = torch.ones_like(decay) if shrinkage is None else shrinkage
        decided = torch.stack([ratios, decay, shrinkage, *others])
        with FlatTensors(segments, self.tables(segments)) as flat, on(segments.device):
            self.second(flat, scale_of(flat.tables, grad_scale), decided, decisions.is_finite)

    def whole_step_(
        self,
        calls: Sequence[Segments],
        *,
        grad_scale: Tensor | None,
        max_grad_norm: float | None,
        num_skipped: Tensor,
        num_skipped_layers: Tensor,
    ) -> list[LayerFigures]:
        for segments in calls:
            if segments.stats is None:
                shape = (len(segments.rule.figures()), segments.num_layers)
                segments.stats = torch.full(shape, torch.nan, dtype=torch.float64, device=segments.device)
        with contextlib.ExitStack() as stack:
            flats = [stack.enter_context(FlatTensors(segments, self.tables(segments))) for segments in calls]
            last = flats[-1].tables
            if grad_scale is not None:
                last.factor.copy_(grad_scale)
            if max_grad_norm != last.known_max_norm and max_grad_norm is not None:
                upload_(last.max_norm, max_grad_norm)
                last.known_max_norm = max_grad_norm
            stack.enter_context(on(calls[-1].device))
            counts = (num_skipped, num_skipped_layers)
            depends_on = [
                grad_scale is None,
                max_grad_norm is None,
                *addresses_of(counts),
                *((f.tables, f.tables.num_changes, f.dtypes, f.segments.stats.data_ptr()) for f in flats),
            ]
            if last.steps is not None and last.steps[0] == depends_on:
                for launch_again in last.steps[1]:
                    launch_again()
            else:
                factor = last.one if grad_scale is None else last.factor
                last.steps = depends_on, self.launches_of_step(flats, factor, max_grad_norm is not None, counts)
        return [LayerFigures(segments.stats, flat.tables.moved) for segments, flat in zip(calls, flats, strict=True)]

    # --- launches -------------------------------------------------------------------------------------------------------

    def launches_of_step(
        self, flats: list[FlatTensors], factor: Tensor, clips: bool, counts: tuple[Tensor, Tensor]
    ) -> list[Callable[[], object]]:
        """Takes a step of several calls; returns what launches its kernels again."""
        last, launched = flats[-1], []
        calls = known_calls(flats)
        scale = last.tables.clipped if clips else factor
        if clips:
            for flat in flats:
                clipping = (calls, factor, last.tables) if flat is last else None
                launched.append(self.squares(flat, flat.tables.one, torch.float64, clipping))
        for flat in flats:
            tables = flat.tables
            if flat.segments.rule.norms_before:
                launched.append(self.squares(flat, scale, flat.segments.dtype))
            launched.append(self.first(flat, scale, tables.decisions, flat.segments.stats, decides=True))
        for flat in flats:
            counting = (calls, *counts) if flat is last else None
            launched.append(self.second(flat, scale, flat.tables.decisions, flat.tables.moved, counting))
        return launched

    def common(self, flat: FlatTensors, grad_scale: Tensor) -> dict[str, Any]:
        """What all kernels have as arguments."""
        tables = flat.tables
        return {
            "chunks": tables.chunks,
            "num_chunks": tables.num_chunks,
            "spans": tables.spans,
            "num_spans": tables.num_spans,
            "addresses": tables.addresses,
            "num_layers": flat.segments.num_layers,
            "before": tables.before,
            "grad_scale": grad_scale,
            "G": flat.dtypes[1],
            "CHUNK": CHUNK_NUMEL,
            "ROW_BLOCK": ROW_BLOCK,
        }

    def of_passes(self, flat: FlatTensors, grad_scale: Tensor) -> dict[str, Any]:
        """What both passes have as arguments."""
        tables, segments = flat.tables, flat.segments
        weights, _, states = flat.dtypes
        return self.common(flat, grad_scale) | {
            "rows": tables.rows,
            "rule_options": tables.rule_options,
            "lr_pointer": tables.lr,
            "step_numbers": tables.step_numbers,
            **switches_of_passes(segments.rule),
            "T": DTYPES[segments.dtype],
            "W": weights,
            "S": states,
            "BLOCK": block_numel(*flat.dtypes),
            "HAS_STEPS": bool(segments.steps),
        }

    def squares(
        self,
        flat: FlatTensors,
        grad_scale: Tensor,
        dtype: torch.dtype,
        clipping: tuple[Tensor, Tensor, Tables] | None = None,
    ) -> Callable[[], object]:
        """Renews the tables' ``before`` from the scaled gradients in that dtype.

        Args:
            clipping: all calls, see second_kernel; what gradients are multiplied by before they are clipped; the tables that have
                the bound and get the result.
        """
        tables = flat.tables
        calls, factor, clips = clipping or (tables.addresses, tables.one, tables)
        return launch(
            square_kernel,
            tables.num_chunks,
            row_chunks=tables.row_chunks,
            arrivals=tables.arrivals,
            sums=tables.sums,
            calls=calls,
            num_calls=calls.shape[-1],
            factor=factor,
            max_norm=clips.max_norm,
            clipped=clips.clipped,
            CLIPS=clipping is not None,
            T=DTYPES[dtype],
            BLOCK=block_numel(flat.dtypes[1]),
            **self.common(flat, grad_scale),
        )

    def first(
        self, flat: FlatTensors, grad_scale: Tensor, decisions: Tensor, stats: Tensor, *, decides: bool = False
    ) -> Callable[[], object]:
        tables = flat.tables
        return launch(
            first_kernel,
            tables.num_chunks,
            row_chunks=tables.row_chunks,
            arrivals=tables.arrivals,
            sums=tables.sums,
            decisions=decisions,
            moved=tables.moved.view(torch.int8),
            stats=stats,
            DECIDES=decides,
            DECAY_BEFORE_NORM=options_of(flat.segments.rule).get("decay_before_norm", False),
            **switches_of_layers(flat.segments.rule),
            **self.of_passes(flat, grad_scale),
        )

    def second(
        self,
        flat: FlatTensors,
        grad_scale: Tensor,
        decisions: Tensor,
        moved: Tensor,
        counting: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Callable[[], object]:
        """The second pass.

        Args:
            counting: all calls, see second_kernel; the counts of skipped steps and of skipped layers. Given to the last of the calls.
        """
        options, tables = options_of(flat.segments.rule), flat.tables
        calls, num_skipped, num_skipped_layers = counting or (tables.addresses,) * 3
        return launch(
            second_kernel,
            tables.num_chunks + (counting is not None),
            decisions=decisions,
            moved=moved.view(torch.int8),
            calls=calls,
            num_calls=calls.shape[-1],
            num_skipped=num_skipped,
            num_skipped_layers=num_skipped_layers,
            COUNTS=counting is not None,
            IS_NESTEROV=options.get("nesterov", False),
            LR_IN_MOMENTUM=options.get("lr_in_momentum", False),
            **self.of_passes(flat, grad_scale),
        )

    # --- tables ---------------------------------------------------------------------------------------------------------

    def tables(self, segments: Segments) -> Tables:
        """The tables of a call, with this step's options and learning rate."""
        device = segments.device
        tables = segments.prepared.get("triton")
        if tables is None:
            tables = segments.prepared["triton"] = made(segments)
        if tables.num_changes != segments.num_changes:
            upload_(tables.rows, row_table(segments))
            upload_(tables.rule_options, numbers_of(segments.rule))
            tables.num_changes = segments.num_changes
        lr = segments.lr
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            tables.lr.copy_(lr.reshape(()), non_blocking=True)
            tables.known_lr = None
            return tables
        captures = is_capturing(device)
        if float(lr) != tables.known_lr or captures:
            tables.known_lr = float(lr)
            tables.lr.fill_(tables.known_lr)
            if captures and tables.warns_of_fixed_lr:
                tables.warns_of_fixed_lr = False
                logger.warning(
                    "this step is being captured in a CUDA graph with lr=%g, which every replay will use; to change it "
                    "between replays, make lr a 0-dim tensor on %s and write into that",
                    lr,
                    device,
                )
        return tables


def made(segments: Segments) -> Tables:
    device, spans = segments.device, with_a_span_each(segments)
    owners, starts = cut_into_chunks([span.numel for span in spans])
    first_chunks, ends = [0] * segments.num_layers, [0] * segments.num_layers
    for chunk, owner in enumerate(owners):
        row = spans[owner].row
        first_chunks[row] = chunk if ends[row] == 0 else first_chunks[row]
        ends[row] = chunk + 1
    columns = [
        [s.numel for s in spans],
        [s.row for s in spans],
        [s.layer_start for s in spans],
        [s.tensor for s in spans],
    ]

    def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Tables(
        chunks=uploaded([owners, starts], torch.int64, device).reshape(2, -1),
        spans=uploaded(columns, torch.int64, device).reshape(4, -1),
        row_chunks=uploaded([first_chunks, ends], torch.int64, device),
        rows=uploaded(row_table(segments), torch.float64, device),
        rule_options=uploaded(numbers_of(segments.rule), torch.float64, device),
        addresses=zeros(4 * len(spans) + len(segments.steps), dtype=torch.int64),
        arrivals=zeros(segments.num_layers + 1, dtype=torch.int32),
        sums=zeros(1 + len(segments.rule.norms), len(owners)),
        before=zeros(3, segments.num_layers),
        step_numbers=zeros(segments.num_layers),
        decisions=zeros(2 + len(segments.rule.ratios), segments.num_layers),
        moved=zeros(segments.num_layers, dtype=torch.bool),
        lr=zeros(),
        factor=zeros(),
        clipped=zeros(),
        max_norm=zeros(),
        one=torch.ones((), dtype=torch.float64, device=device),
        num_changes=segments.num_changes,
        starts=[(s.tensor, s.start) for s in spans],
    )


def known_calls(flats: list[FlatTensors]) -> Tensor:
    """[5, num_calls] int64 on the device: where the kernels find what belongs to each call, see second_kernel."""
    columns = []
    for flat in flats:
        tables, num_steps = flat.tables, len(flat.segments.steps)
        counters = tables.addresses[4 * tables.num_spans :]
        squares = tables.before[2]
        columns.append([tables.moved, flat.segments.num_layers, squares, counters, num_steps])
    numbers = [[x if isinstance(x, int) else x.data_ptr() for x in row] for row in zip(*columns, strict=True)]
    last = flats[-1].tables
    if last.calls is None or last.calls[0] != numbers:
        last.calls = numbers, uploaded(numbers, torch.int64, flats[-1].segments.device)
    return last.calls[1]


def scale_of(tables: Tables, grad_scale: Tensor | None) -> Tensor:
    return tables.one if grad_scale is None else grad_scale.double()


class FlatTensors:
    """The tensors of a call as flat arrays, as a context; irregular ones are copied in at its start and back at its end.

    Tells the device where they are, if that has changed.
    """

    def __init__(self, segments: Segments, tables: Tables):
        self.segments, self.tables = segments, tables
        self.copies: list[tuple[Tensor, Tensor]] = []
        columns = [segments.weights, segments.grads, *zip(*segments.states, strict=True)]
        of_weights = segments.prepared.pop("weights lie at", None) or addresses_of(segments.weights)
        addresses = [of_weights, *map(addresses_of, columns[1:])]
        layouts = layouts_of(segments, addresses[1])
        kept = [tables.known.get(place) == column for place, column in enumerate(addresses) if place != 1]
        if layouts != tables.regular or not all(kept):
            columns = self.flat_columns()
            addresses = [addresses_of(column) for column in columns]
            tables.regular = None if self.has_copied else layouts
        for place, column in enumerate(columns):
            self.tell(place, addresses[place], column[0].element_size())
        if segments.steps:
            self.tell(4, addresses_of(segments.steps), None)
        self.dtypes = tuple(DTYPES[column[0].dtype] for column in columns[:3])
        """Of weights, gradients and state."""

    def flat_columns(self) -> list[list[Tensor]]:
        segments = self.segments
        self.has_copied = False
        weights = [self.flat(w.detach(), None, 0, i) for i, w in enumerate(segments.weights)]
        columns = [
            weights,
            [self.flat(g, w, 1, i) for i, (w, g) in enumerate(zip(weights, segments.grads, strict=True))],
        ]
        for place, column in enumerate(zip(*segments.states, strict=True), start=2):
            columns.append([self.flat(s, w, place, i) for i, (w, s) in enumerate(zip(weights, column, strict=True))])
        return columns

    def flat(self, tensor: Tensor, like: Tensor | None, column: int, index: int) -> Tensor:
        """The tensor if it is dense and laid out like the other; else a copy that is, always in the same place."""
        if is_dense(tensor) and (like is None or are_laid_out_alike(tensor, like)):
            return tensor
        self.has_copied = True
        copy = self.tables.copies.get((column, index))
        if copy is None or copy.dtype != tensor.dtype or not (like is None or are_laid_out_alike(copy, like)):
            if like is None:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            else:
                copy = torch.empty_like(like, dtype=tensor.dtype)
            self.tables.copies[column, index] = copy
        copy.copy_(tensor)
        if column != 1:  # gradients are read only
            self.copies.append((tensor, copy))
        return copy

    def tell(self, place: int, addresses: list[int], element_size: int | None) -> None:
        """Writes the addresses of a column's tensors to the device, of each span that of its first element; or of step counts."""
        tables = self.tables
        if tables.known.get(place) == addresses:
            return
        begin = place * tables.num_spans
        told = addresses
        if element_size is not None:
            told = [addresses[i] + start * element_size for i, start in tables.starts]
        upload_(tables.addresses[begin : begin + len(told)], told)
        tables.known[place] = addresses

    def __enter__(self) -> FlatTensors:
        return self

    def __exit__(self, *_: Any) -> None:
        for tensor, copy in self.copies:
            tensor.copy_(copy)
