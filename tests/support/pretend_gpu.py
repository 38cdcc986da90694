"""A CUDA device that is not there: tensors on it have shapes but no values, and what the host does with them is watched.

Host tensors are real, those on "cuda" are fake (torch's FakeTensorMode). Every operation passes through
:class:`PretendGPU`, which knows what CUDA would do: where the host would have to wait, what a queued copy still reads,
and which memory a captured step reads. Kernels are not run; whoever tests a module that launches some stubs the launch.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_VALUES = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "_unique", "_unique2")
"""Operations whose result the host must know before it can go on."""


class WaitsForTheDeviceError(AssertionError):
    """The host would stand still until the device has done all that is queued."""


@dataclass
class QueuedCopy:
    """A copy from pinned memory that the device may not have made yet, and what it shall read there."""

    source: Tensor
    values: Tensor
    where: str


@dataclass
class Capture:
    """What a captured step reads that was there before: {id of storage: weak reference}, and where."""

    made_inside: set[int] = field(default_factory=set)
    read: dict[int, tuple[weakref.ref, str]] = field(default_factory=dict)

    def freed(self) -> list[str]:
        """Where the step reads memory that is gone by now."""
        gc.collect()
        return [where for reference, where in self.read.values() if reference() is None]


def on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def line_of_ours() -> str:
    """Where in largebatch (else: in the test) the operation was asked for."""
    frames = [f for f in traceback.extract_stack() if "pretend_gpu" not in f.filename and "/torch/" not in f.filename]
    folders = ("/plugin/", "/launch/", "/models/", "/benchmarks/")
    ours = [f for f in frames if "site-packages" not in f.filename and any(name in f.filename for name in folders)]
    frame = (ours or frames)[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


class PretendGPU(TorchDispatchMode):
    """See the module. Use :func:`pretend_gpu`.

    Attributes:
        waits: what made the host wait so far, with the line that did; an error at once inside :meth:`no_waits`.
        queued: copies from pinned memory.
        launches: (kernel, index of the current device) of every stubbed launch that was reported by :meth:`launched`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.queued: list[QueuedCopy] = []
        self.launches: list[tuple[str, int]] = []
        self.current_device = 0
        self.capture: Capture | None = None
        self._is_strict = False
        self._pinned: dict[int, weakref.ref] = {}

    # --- what is watched ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def no_waits(self) -> Iterator[None]:
        """Inside, an operation that would wait for the device is a WaitsForTheDeviceError."""
        before, self._is_strict = self._is_strict, True
        try:
            yield
        finally:
            self._is_strict = before

    @contextlib.contextmanager
    def may_wait(self) -> Iterator[list[str]]:
        """Inside, what would wait goes to this list instead, and is no error."""
        before, was_strict = self.waits, self._is_strict
        self.waits, self._is_strict = [], False
        try:
            yield self.waits
        finally:
            self.waits, self._is_strict = before, was_strict

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Capture]:
        """Inside, torch says that the current stream is being captured in a CUDA graph."""
        self.capture = capture = Capture()
        try:
            yield capture
        finally:
            self.capture = None

    def changed_copies(self) -> list[str]:
        """Where a copy was queued whose source has changed since."""
        with unset_fake_temporarily():
            return [c.where for c in self.queued if not torch.equal(c.source, c.values)]

    def launched(self, kernel: str, arguments: object) -> None:
        """Called in the place of a launch: the kernel reads and writes these tensors."""
        self.launches.append((kernel, self.current_device))
        self._note_reads(tree_leaves(arguments))

    # --- operations -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function._schema.name.removeprefix("aten::")
        values = tree_leaves((args, kwargs))
        if name == "_pin_memory":
            return self._as_pinned(self._on_host(function.__class__, args[0].clone))
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if kwargs.get("pin_memory"):
            return self._as_pinned(self._on_host(function, function, *args, **kwargs | {"pin_memory": False}))
        devices = [v for v in values if isinstance(v, torch.device) and v.type == "cuda"]
        if not devices and not any(isinstance(v, FakeTensor) for v in values):
            return self._on_host(function, function, *args, **kwargs)
        self._check_waits(name, args, kwargs, values)
        self._note_reads(values)
        if name == "copy_" and on_device(args[1]) and not on_device(args[0]):
            return self._on_host(function, args[0].zero_)  # nobody knows the values
        result = function(*args, **kwargs)
        if self.capture is not None:
            known = {id_of(v) for v in values if on_device(v)}
            self.capture.made_inside |= {id_of(v) for v in tree_leaves(result) if on_device(v)} - known
        return result

    def _on_host(self, _, function, *args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    def _as_pinned(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = weakref.ref(storage)
        self._alive = [*getattr(self, "_alive", []), storage]  # so that no address comes back
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in self._pinned

    def _check_waits(self, name: str, args, kwargs, values) -> None:
        if name in READS_VALUES and any(map(on_device, values)):
            self._wait(f"{name} reads values of the device")
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(on_device(i) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1])):
                self._wait(f"{name} by a mask counts on the device")
        elif name == "copy_":
            target, source = args[:2]
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if on_device(source) and non_blocking and self._is_pinned(target):
                return  # whoever reads it has an event to wait for
            is_same_layout = target.stride() == source.stride() or (target.is_contiguous() and source.is_contiguous())
            self._check_copy(source, target.device, target.dtype, non_blocking, is_same_layout)
        elif name == "_to_copy":
            source = args[0]
            device, dtype = kwargs.get("device") or source.device, kwargs.get("dtype") or source.dtype
            layout = kwargs.get("memory_format") or torch.preserve_format
            is_same_layout = layout is torch.preserve_format or source.is_contiguous(memory_format=layout)
            self._check_copy(source, device, dtype, kwargs.get("non_blocking", False), is_same_layout)

    def _check_copy(
        self, source: Tensor, device: torch.device, dtype: torch.dtype, non_blocking: bool, is_same_layout: bool
    ) -> None:
        if source.device.type == device.type:
            return
        if source.device.type == "cuda":
            self._wait("a copy to the host")  # without an event nobody knows when its values are there
        elif source.numel() == 0:
            return
        elif not self._is_pinned(source):
            self._wait("a copy from memory that is not pinned")
        elif not non_blocking:
            self._wait("a copy without non_blocking=True")
        elif dtype != source.dtype or not (is_same_layout and is_non_overlapping_and_dense_or_false(source)):
            self._wait("a copy that changes dtype or layout, which goes through memory that is not pinned")
        else:
            with unset_fake_temporarily():
                self.queued.append(QueuedCopy(source, source.clone(), line_of_ours()))
        if self.capture is not None:
            raise AssertionError(
                f"a copy from the host is captured, and would be repeated at each replay: {line_of_ours()}"
            )

    def _wait(self, what: str) -> None:
        self.waits.append(f"{what}: {line_of_ours()}")
        if self._is_strict:
            raise WaitsForTheDeviceError(self.waits[-1])

    def _note_reads(self, values) -> None:
        if self.capture is None:
            return
        for value in filter(on_device, values):
            key = id_of(value)
            if key not in self.capture.made_inside and key not in self.capture.read:
                reference = weakref.ref(value.untyped_storage())
                self.capture.read[key] = reference, line_of_ours()


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """loss.backward(), node by node: autograd's own engine asks CUDA for a context."""
    nodes: dict[object, None] = {}  # each after all that come before it in the forward pass

    def visit(node) -> None:
        if node is not None and node not in nodes:
            for following, _ in node.next_functions:
                visit(following)
            nodes[node] = None

    visit(loss.grad_fn)
    arrived = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(nodes):
        grads = [arrived.get(node, {}).get(i) for i in range(len(node._input_metadata))]
        if hasattr(node, "variable"):
            node.variable.grad = grads[0] if node.variable.grad is None else node.variable.grad + grads[0]
            continue
        results = node.apply(*grads) if hasattr(node, "apply") else node(*grads)
        results = results if isinstance(results, tuple) else (results,)
        # a function of ours has results for arguments that are no tensors, too; they come last
        for result, (following, index) in zip(results, node.next_functions, strict=False):
            if result is not None and following is not None:
                wanted, there = following._input_metadata[index], arrived.setdefault(following, {})
                result = result.sum_to_size(wanted.shape).to(wanted.dtype)
                there[index] = result if index not in there else there[index] + result


def address(tensor: Tensor) -> int:
    """In the place of Tensor.data_ptr: one address a storage, at a multiple of 256 bytes."""
    return (tensor.untyped_storage()._cdata << 8) + tensor.storage_offset() * tensor.element_size()


@contextlib.contextmanager
def pretend_gpu(monkeypatch) -> Iterator[PretendGPU]:
    """Inside, "cuda" is a device with fake tensors. ``torch.cuda.synchronize`` and waiting for an event count as waits."""
    gpu = PretendGPU()

    class Event:
        """torch.cuda.Event: what was queued before it is done as soon as anybody asks."""

        def __init__(self, **_):
            self.is_recorded = False

        def record(self, stream: object = None) -> None:
            self.is_recorded = True

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            assert self.is_recorded
            gpu._wait("torch.cuda.Event.synchronize")

        def elapsed_time(self, other: Event) -> float:
            assert self.is_recorded and other.is_recorded
            return 1.0

    class Device:
        """torch.cuda.device: the current device inside."""

        def __init__(self, device: torch.device | int | None):
            index = device.index if isinstance(device, torch.device) else device
            self.index = gpu.current_device if index is None else index

        def __enter__(self):
            self.before, gpu.current_device = gpu.current_device, self.index

        def __exit__(self, *_):
            gpu.current_device = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.current_device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capture is not None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: gpu._wait("torch.cuda.synchronize"))
    monkeypatch.setattr(Tensor, "data_ptr", address)
    monkeypatch.setattr(FakeTensor, "data_ptr", address, raising=False)
    monkeypatch.setattr(Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True), gpu:
        yield gpu
