"""The kernels for CUDA tensors in Triton: three launches a step, five of LANS, whatever the number of layers, and no wait for the device.

The kernels themselves are in triton_kernels; here are the tables in which they look things up, and their launches.
Learning rate, step counts, gradient scale and what is not finite stay on the device. A step can be captured in a CUDA graph
once it has been taken with the same tensors: whatever it reads then stays where it is. Options that change later are written
there, so that replays follow them.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from largebatch.kernels.interface import ALGORITHMS, Before, Decisions, LayerFigures, Segments, upload_, uploaded
from largebatch.kernels.triton_kernels import (
    BLOCK_NUMEL,
    CHUNK_NUMEL,
    ROW_BLOCK,
    first_kernel,
    layer_kernel,
    norm_kernel,
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
    """What the layers' kernel is compiled for."""
    options = options_of(rule)
    is_2017 = rule.name == "lars"
    return {
        "ALGORITHM": ALGORITHMS[type(rule)],
        "HAS_NORM_BOUNDS": options["weight_norm_bounds"] is not None,
        "HAS_RATIO_BOUNDS": options["trust_ratio_bounds"] is not None,
        "LARC_CLIP": is_2017 and options["larc_clip"],
        "DECAY_IN_RATIO": is_2017 and options["decay_in_ratio"] and not options["decay_before_norm"],
        "DAMPS": is_2017 and options["damp_ratio_by_momentum"],
        "SKIPS_ZERO_NORMS": is_2017 and options["skip_zero_norm_layers"],
    }


def row_table(segments: Segments) -> list[list[float]]:
    """[4, num_layers]: what the kernels know of each layer, see layer_kernel."""
    rows = (segments.weight_decays, segments.seeds, segments.decoupled_weight_decays, segments.are_adapted)
    return [[float(x) for x in row] for row in rows]


def cut_into_chunks(numels: list[int]) -> tuple[list[int], list[int]]:
    """(owner, first element) of each chunk."""
    owners, starts = [], []
    for owner, numel in enumerate(numels):
        for start in range(0, numel, CHUNK_NUMEL):
            owners.append(owner)
            starts.append(start)
    return owners, starts


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


def launch(kernel: Any, num_programs: int, device: torch.device, **arguments: Any) -> None:
    """Launches a kernel on the device where its tensors are, which need not be the current one."""
    if num_programs == 0:
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[(num_programs,)](**arguments)
    else:  # in Triton's interpreter
        kernel[(num_programs,)](**arguments)


def probe(device: torch.device) -> None:
    """Compiles and launches a kernel of one store. Raises whatever Triton raises where it cannot."""
    launch(probe_kernel, 1, device, x=torch.zeros((), device=device))


@dataclass
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
    sums: Tensor
    """[1 + len(rule.norms), num_chunks] fp64, written by the first pass."""
    before: Tensor
    """[3, num_layers] fp64, written by the norms' kernel; of rules without norms before of no use."""
    decisions: Tensor
    """[2 + len(rule.ratios), num_layers] fp64, written by the layers' kernel."""
    moved: Tensor
    """[num_layers] bool, likewise."""
    lr: Tensor
    """0-dim fp64."""
    one: Tensor
    """0-dim fp64: the gradient scale where there is none."""
    num_changes: int
    """Of the segments' options, that the tables know of."""
    known: list[int] = field(default_factory=list)
    """The addresses that the device has."""
    copies: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(column, tensor) -> where an irregular tensor is copied in each step."""
    warns_of_fixed_lr: bool = True

    @property
    def num_chunks(self) -> int:
        return self.chunks.shape[1]

    @property
    def num_spans(self) -> int:
        return self.spans.shape[1]


class TritonKernels:
    """See :class:`largebatch.kernels.interface.FusedKernels`."""

    name = "triton"
    is_fused = True

    def is_current(self, segments: Segments) -> bool:
        return segments.have_same_layout()

    def count_(self, segments: Segments) -> None:
        if segments.steps:
            torch._foreach_add_(segments.steps, 1.0)

    def grad_square_sum(self, segments: Segments) -> Tensor:
        with FlatTensors(segments, self.tables(segments)) as flat:
            return self.square_sums(segments, flat, None, torch.float64).sum()

    def sums_before(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        with FlatTensors(segments, self.tables(segments)) as flat:
            return self.find_norms(segments, flat, grad_scale)[2, :, None]

    def accumulate_(self, segments: Segments, *, grad_scale: Tensor | None, before: Before | None = None) -> Tensor:
        tables = self.tables(segments)
        if before is not None:
            (norm,) = before.norms.double()
            divisor = torch.where(before.is_finite, torch.where(norm > 0, norm, 1.0), torch.nan)
            tables.before.copy_(torch.stack([divisor, norm, norm.square()]))
        with FlatTensors(segments, tables) as flat:
            self.first(segments, flat, grad_scale)
        num_sums = 1 + len(segments.rule.norms)
        sums = torch.empty(segments.num_layers, num_sums, dtype=torch.float64, device=segments.device)
        self.reduce(segments, tables, sums, decides=False)
        return sums

    def advance_(self, segments: Segments, *, grad_scale: Tensor | None, decisions: Decisions) -> None:
        (ratios, *others), decay, shrinkage = decisions.ratios.double(), decisions.weight_decays, decisions.shrinkage
        shrinkage = torch.ones_like(decay) if shrinkage is None else shrinkage
        decided = torch.stack([ratios, decay, shrinkage, *others])
        with FlatTensors(segments, self.tables(segments)) as flat:
            self.second(segments, flat, grad_scale, decided, decisions.is_finite)

    def step_(self, segments: Segments, *, grad_scale: Tensor | None) -> LayerFigures:
        if segments.stats is None:
            shape = (len(segments.rule.figures()), segments.num_layers)
            segments.stats = torch.full(shape, torch.nan, dtype=torch.float64, device=segments.device)
        with FlatTensors(segments, self.tables(segments)) as flat:
            tables = flat.tables
            if segments.rule.norms_before:
                self.find_norms(segments, flat, grad_scale)
            self.first(segments, flat, grad_scale)
            self.reduce(segments, tables, tables.decisions, decides=True)
            self.second(segments, flat, grad_scale, tables.decisions, tables.moved)
        return LayerFigures(segments.stats, tables.moved)

    # --- launches -------------------------------------------------------------------------------------------------------

    def common(self, segments: Segments, flat: FlatTensors, grad_scale: Tensor | None) -> dict[str, Any]:
        tables = flat.tables
        return {
            "chunks": tables.chunks,
            "num_chunks": tables.num_chunks,
            "spans": tables.spans,
            "num_spans": tables.num_spans,
            "addresses": tables.addresses,
            "rows": tables.rows,
            "num_layers": segments.num_layers,
            "rule_options": tables.rule_options,
            "grad_scale": tables.one if grad_scale is None else grad_scale.double(),
            **switches_of_passes(segments.rule),
            "T": DTYPES[segments.dtype],
            "W": DTYPES[flat.weights[0].dtype],
            "G": DTYPES[flat.grads[0].dtype],
            "S": DTYPES[flat.states[0][0].dtype],
            "HAS_STEPS": bool(segments.steps),
            "CHUNK": CHUNK_NUMEL,
            "BLOCK": BLOCK_NUMEL,
        }

    def square_sums(
        self, segments: Segments, flat: FlatTensors, grad_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[num_chunks] fp64: of the squares of the scaled gradients in that dtype."""
        tables = flat.tables
        sums = torch.empty(tables.num_chunks, dtype=torch.float64, device=segments.device)
        launch(
            square_kernel,
            tables.num_chunks,
            segments.device,
            chunks=tables.chunks,
            num_chunks=tables.num_chunks,
            spans=tables.spans,
            num_spans=tables.num_spans,
            addresses=tables.addresses,
            grad_scale=tables.one if grad_scale is None else grad_scale.double(),
            sums=sums,
            T=DTYPES[dtype],
            G=DTYPES[flat.grads[0].dtype],
            CHUNK=CHUNK_NUMEL,
            BLOCK=BLOCK_NUMEL,
        )
        return sums

    def find_norms(self, segments: Segments, flat: FlatTensors, grad_scale: Tensor | None) -> Tensor:
        """The tables' ``before``, renewed from what lies here."""
        tables = flat.tables
        launch(
            norm_kernel,
            segments.num_layers,
            segments.device,
            sums=self.square_sums(segments, flat, grad_scale, segments.dtype),
            num_chunks=tables.num_chunks,
            row_chunks=tables.row_chunks,
            num_layers=segments.num_layers,
            before=tables.before,
            T=DTYPES[segments.dtype],
            BLOCK=ROW_BLOCK,
        )
        return tables.before

    def first(self, segments: Segments, flat: FlatTensors, grad_scale: Tensor | None) -> None:
        launch(
            first_kernel,
            flat.tables.num_chunks,
            segments.device,
            before=flat.tables.before,
            sums=flat.tables.sums,
            DECAY_BEFORE_NORM=options_of(segments.rule).get("decay_before_norm", False),
            **self.common(segments, flat, grad_scale),
        )

    def reduce(self, segments: Segments, tables: Tables, decisions: Tensor, *, decides: bool) -> None:
        rule = segments.rule
        launch(
            layer_kernel,
            segments.num_layers,
            segments.device,
            sums=tables.sums,
            num_chunks=tables.num_chunks,
            row_chunks=tables.row_chunks,
            rows=tables.rows,
            num_layers=segments.num_layers,
            rule_options=tables.rule_options,
            lr_pointer=tables.lr,
            before=tables.before,
            decisions=decisions,
            moved=tables.moved.view(torch.int8),
            stats=segments.stats if decides else decisions,
            DECIDES=decides,
            **switches_of_layers(rule),
            T=DTYPES[segments.dtype],
            BLOCK=ROW_BLOCK,
        )

    def second(
        self, segments: Segments, flat: FlatTensors, grad_scale: Tensor | None, decisions: Tensor, moved: Tensor
    ) -> None:
        options = options_of(segments.rule)
        launch(
            second_kernel,
            flat.tables.num_chunks,
            segments.device,
            lr_pointer=flat.tables.lr,
            before=flat.tables.before,
            decisions=decisions,
            moved=moved.view(torch.int8),
            IS_NESTEROV=options.get("nesterov", False),
            LR_IN_MOMENTUM=options.get("lr_in_momentum", False),
            **self.common(segments, flat, grad_scale),
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
        else:
            tables.lr.fill_(float(lr))
            if is_capturing(device) and tables.warns_of_fixed_lr:
                tables.warns_of_fixed_lr = False
                logger.warning(
                    "this step is being captured in a CUDA graph with lr=%g, which every replay will use; to change it "
                    "between replays, make lr a 0-dim tensor on %s and write into that",
                    lr,
                    device,
                )
        return tables


def made(segments: Segments) -> Tables:
    device, spans = segments.device, segments.spans
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
        sums=zeros(1 + len(segments.rule.norms), len(owners)),
        before=zeros(3, segments.num_layers),
        decisions=zeros(2 + len(segments.rule.ratios), segments.num_layers),
        moved=zeros(segments.num_layers, dtype=torch.bool),
        lr=zeros(),
        one=torch.ones((), dtype=torch.float64, device=device),
        num_changes=segments.num_changes,
    )


class FlatTensors:
    """The tensors of a call as flat arrays, as a context; irregular ones are copied in at its start and back at its end.

    Tells the device where they are, if that has changed.
    """

    def __init__(self, segments: Segments, tables: Tables):
        self.tables = tables
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.weights = [self.flat(w.detach(), None, 0, i) for i, w in enumerate(segments.weights)]
        self.states = [
            tuple(self.flat(s, w, 2 + column, i) for column, s in enumerate(state))
            for i, (w, state) in enumerate(zip(self.weights, segments.states, strict=True))
        ]
        self.grads = [self.flat(g, w, 1, i) for i, (w, g) in enumerate(zip(self.weights, segments.grads, strict=True))]
        self.tell_addresses(segments)

    def flat(self, tensor: Tensor, like: Tensor | None, column: int, index: int) -> Tensor:
        """The tensor if it is dense and laid out like the other; else a copy that is, always in the same place."""
        if is_dense(tensor) and (like is None or are_laid_out_alike(tensor, like)):
            return tensor
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

    def tell_addresses(self, segments: Segments) -> None:
        starts = [(span.tensor, span.start) for span in segments.spans]
        known = []
        for column in (self.weights, self.grads, *zip(*self.states, strict=True)):
            size, addresses = column[0].element_size(), [t.data_ptr() for t in column]
            known += [addresses[i] + start * size for i, start in starts]
        known += [0] * ((2 - len(self.states[0])) * len(starts))
        known += [step.data_ptr() for step in segments.steps]
        if known != self.tables.known:
            upload_(self.tables.addresses, known)
            self.tables.known = known

    def __enter__(self) -> FlatTensors:
        return self

    def __exit__(self, *_: Any) -> None:
        for tensor, copy in self.copies:
            tensor.copy_(copy)
