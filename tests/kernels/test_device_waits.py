"""What a step asks of a GPU, seen on one that is not there: no wait for it, no race with it, nothing freed that it still reads.

Kernels are stubbed; everything around them runs, on fake tensors (tests/support/pretend_gpu.py).
"""

import logging

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import largebatch
from largebatch.kernels import dispatch
from largebatch.kernels.reference import ReferenceKernels
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import slice_of_concatenation
from largebatch.optim import layerwise
from support.backends import OPTION_SETS, name_of
from support.pretend_gpu import WaitsForTheDeviceError, pretend_gpu

triton_gpu = pytest.importorskip("largebatch.kernels.triton_gpu", reason="triton is not installed")
from largebatch.kernels import triton_kernels  # noqa: E402

SHAPES = ((37, 13), (1,), (0, 3), (4, 3, 5, 5))
ALGORITHMS = [
    (largebatch.LARS, {}),
    (largebatch.LARS, {"formulation": "2019"}),
    (largebatch.LAMB, {}),
    (largebatch.NLAMB, {}),
    (largebatch.NNLAMB, {}),
    (largebatch.LANS, {}),
]
each_algorithm = pytest.mark.parametrize("optimizer_class, options", ALGORITHMS, ids=name_of)


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, with the Triton kernels stubbed."""
    with pretend_gpu(monkeypatch) as gpu:

        def stubbed(kernel, grid):
            return lambda *args, **arguments: gpu.launched(kernel.fn.__name__, (args, arguments))

        monkeypatch.setattr(type(triton_kernels.first_kernel), "__getitem__", stubbed)
        backends = {"reference": ReferenceKernels(), "auto": triton_gpu.TritonKernels()}
        monkeypatch.setattr(dispatch, "choose", lambda device_type, requested: backends[requested])
        yield gpu


@pytest.fixture
def two_ranks():
    """This process as the first of two; what the other sends is nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def parameters(device="cuda", dtype=torch.float32, shapes=SHAPES):
    return [
        (f"w{i}", torch.nn.Parameter(torch.ones(shape, device=device, dtype=dtype))) for i, shape in enumerate(shapes)
    ]


def give_gradients(named):
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)


def stepped(gpu, optimizer, named, num_steps=3, before=lambda step: None):
    """Steps with new gradients, learning rates and decays; none may wait, nor change what a queued copy still reads."""
    for step in range(num_steps):
        give_gradients(named)
        group = optimizer.param_groups[0]
        group["lr"] = group["lr"] if isinstance(group["lr"], torch.Tensor) else 0.01 * (step + 1)
        if group["weight_decay"]:
            group["weight_decay"] *= 0.9
        before(step)
        with gpu.no_waits():
            optimizer.step()
        assert gpu.changed_copies() == []


def sharded(optimizer_class, options, process_group):
    """A flat partition of layers that another rank has parts of."""
    layers = parameters()
    optimizer = optimizer_class(layers, lr=0.1, **options)
    numels = [p.numel() for _, p in layers]
    offsets = [sum(numels[:i]) for i in range(len(numels))]
    flat = torch.nn.Parameter(torch.ones(500, device="cuda"))
    optimizer.await_layout()
    optimizer.param_groups[0]["params"] = [flat]
    layer_map = slice_of_concatenation(numels, offsets, flat.numel(), 0)
    optimizer.attach({flat: Partition(layer_map, tuple(p for _, p in layers), process_group)})
    return optimizer, [("flat", flat)]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("optimizer_class, options", OPTION_SETS, ids=name_of)
def test_no_step_waits(gpu, optimizer_class, options, kernels):
    named = parameters()
    stepped(gpu, optimizer_class(named, lr=0.1, kernels=kernels, **options), named)
    assert kernels == "reference" or {"first_kernel", "second_kernel"} <= {k for k, _ in gpu.launches}


@each_algorithm
def test_no_step_waits_with_bf16_state_and_parameters_of_three_dtypes(gpu, optimizer_class, options):
    named = [
        (f"{dtype} {name}", p)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for name, p in parameters(dtype=dtype)
    ]
    stepped(gpu, optimizer_class(named, lr=0.1, state_dtype="bf16", **options), named)


@each_algorithm
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_step_waits_under_a_learning_rate_tensor(gpu, optimizer_class, options, device):
    named = parameters()
    lr = torch.full((), 0.1, device=device)
    stepped(gpu, optimizer_class(named, lr=lr, **options), named, before=lambda step: lr.fill_(0.1 * step))


@each_algorithm
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no clip", "clip"])
def test_no_step_waits_under_a_grad_scaler(gpu, optimizer_class, options, clip):
    """It hands over the scale and what it found as tensors on the device."""
    named = parameters(dtype=torch.float16)
    optimizer = optimizer_class(named, lr=0.1, max_grad_norm=clip, **options)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    stepped(gpu, optimizer, named)


@each_algorithm
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_no_step_waits_where_layers_are_cut(gpu, two_ranks, optimizer_class, options, kernels):
    decays = {"weight_decay": 0.1} if options else {"weight_decay": 0.1, "decoupled_weight_decay": True}
    optimizer, named = sharded(optimizer_class, options | decays | {"kernels": kernels}, two_ranks)
    stepped(gpu, optimizer, named)


def test_apex_waits_once_a_step(gpu, monkeypatch):
    """By its nature: whether the step is taken, and its number, are arguments of apex's kernels."""
    from largebatch.kernels.apex_gpu import ApexKernels

    def norms(no_overflow, lists, per_tensor):
        return None, torch.stack([t.norm() for t in lists[0]])

    class Functors:
        multi_tensor_l2norm, multi_tensor_lamb = norms, None

    apex = ApexKernels(lambda function, *arguments: function(*arguments) if function else None, Functors)
    read = []
    monkeypatch.setattr(apex, "read", lambda *tensors: read.append(len(tensors)) or [1.0] * len(tensors))
    monkeypatch.setattr(dispatch, "choose", lambda device_type, requested: apex)
    named = parameters(shapes=((3,), (4, 2), (5,)))
    stepped(gpu, largebatch.LAMB(named, lr=0.1), named)
    assert read == [5, 5, 5]  # what is finite, the scale, and three step counts


def test_a_copy_from_memory_that_is_used_again_would_be_seen(gpu):
    """The tests above can fail: each kind of fault, made on purpose."""
    device = torch.zeros(3, device="cuda")
    with pytest.raises(WaitsForTheDeviceError, match="reads values"), gpu.no_waits():
        torch._foreach_add_([device], torch.ones((), device="cuda"))
    with pytest.raises(WaitsForTheDeviceError, match="not pinned"), gpu.no_waits():
        torch.tensor([1.0], device="cuda")
    table = torch.zeros(3).pin_memory()
    with gpu.no_waits():
        device.copy_(table, non_blocking=True)
    assert gpu.changed_copies() == []
    table[1] = 5.0
    assert len(gpu.changed_copies()) == 1
    with gpu.capturing() as capture:
        device += torch.ones(3, device="cuda")
    assert capture.freed() == []
    del device
    assert len(capture.freed()) == 1


# --- CUDA graphs --------------------------------------------------------------------------------------------------------


def capture_cases():
    for optimizer_class, options in ALGORITHMS:
        name = f"{name_of(optimizer_class)}{options.get('formulation', '')}"
        for kernels in ("auto", "reference"):
            for kind in ("plain", "clip", "scaler", "cut"):
                yield pytest.param(optimizer_class, options | {"kernels": kernels}, kind, id=f"{name} {kernels} {kind}")


@pytest.mark.parametrize("optimizer_class, options, kind", list(capture_cases()))
def test_what_a_captured_step_reads_stays(gpu, request, optimizer_class, options, kind):
    """Also after further steps, other options, another param group, and without a copy from the host."""
    options = options | {"weight_decay": 0.1}
    if kind == "cut":
        optimizer, named = sharded(optimizer_class, options, request.getfixturevalue("two_ranks"))
    else:
        named = parameters()
        clip = 1.0 if kind in ("clip", "scaler") else None
        optimizer = optimizer_class(named, lr=0.1, max_grad_norm=clip, **options)
        if kind == "scaler":
            optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    lr = torch.full((), 0.1, device="cuda")
    optimizer.param_groups[0]["lr"] = lr
    give_gradients(named)
    optimizer.step()
    with gpu.no_waits(), gpu.capturing() as capture:
        optimizer.step()
    assert capture.read, "nothing was captured"
    assert capture.freed() == []
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.2
    optimizer.step()
    if kind != "cut":
        new = torch.nn.Parameter(torch.ones(3, device="cuda"))
        optimizer.add_param_group({"params": [("new", new)]})
        kept, named[0][1].grad = named[0][1].grad, None  # another plan; the gradient itself is the caller's to keep
        assert kept is not None
        optimizer.step()
    assert capture.freed() == []


def stepped_once(optimizer_class=largebatch.LAMB):
    named = parameters()
    optimizer = optimizer_class(named, lr=torch.full((), 0.1, device="cuda"), weight_decay=0.1)
    give_gradients(named)
    optimizer.step()
    return optimizer, named


def test_a_first_step_in_a_capture_is_an_error(gpu):
    named = parameters()
    optimizer = largebatch.LAMB(named, lr=torch.full((), 0.1, device="cuda"))
    give_gradients(named)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph.*Take a step before"), gpu.capturing():
        optimizer.step()


@pytest.mark.parametrize("what", ["gradient", "weight_decay", "betas"])
def test_what_changes_in_a_capture_is_an_error(gpu, what):
    """An address or an option that came with a copy from the host: each replay would read that memory again."""
    optimizer, named = stepped_once()
    if what == "gradient":
        named[1][1].grad = torch.ones_like(named[1][1])
    else:
        optimizer.param_groups[0][what] = {"weight_decay": 0.3, "betas": (0.8, 0.9)}[what]
    with pytest.raises(
        RuntimeError, match="one of them lies elsewhere than in the last step, or an option has changed"
    ):
        with gpu.capturing():
            optimizer.step()


def test_a_learning_rate_that_a_capture_makes_constant_is_said(gpu, caplog):
    optimizer, _ = stepped_once()
    optimizer.param_groups[0]["lr"] = 0.25
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        for _ in range(2):
            with gpu.capturing():
                optimizer.step()
    assert [r.message[:70] for r in caplog.records] == [
        "this step is being captured in a CUDA graph with lr=0.25, which every "
    ]


def test_options_that_change_after_a_capture_are_written_where_it_reads_them(gpu):
    optimizer, _ = stepped_once()
    (call,) = next(iter(optimizer._plans.values())).calls
    tables = call.segments.prepared["triton"]
    places = tables.rows.data_ptr(), tables.rule_options.data_ptr()
    num_copies = len(gpu.queued)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    optimizer.step()
    assert (tables.rows.data_ptr(), tables.rule_options.data_ptr()) == places
    rows, options = (copy.values for copy in gpu.queued[num_copies:])
    assert rows[0].tolist() == [0.3] * len(SHAPES) and options[0] == 0.9


# --- where, and how much ------------------------------------------------------------------------------------------------


@each_algorithm
def test_kernels_are_launched_on_the_device_of_the_tensors(gpu, optimizer_class, options):
    """cuda:0 is the current device throughout."""
    named = parameters("cuda:1")
    optimizer = optimizer_class(named, lr=0.1, max_grad_norm=1.0, **options)
    stepped(gpu, optimizer, named)
    assert {kernel for kernel, _ in gpu.launches} == {"square_kernel", "first_kernel", "second_kernel"}
    assert {device for _, device in gpu.launches} == {1} and gpu.current_device == 0


class Operators(TorchDispatchMode):
    """Names of the operators that torch is asked for; a view computes nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@each_algorithm
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no clip", "clip"])
def test_a_step_is_its_launches_and_nothing_else(gpu, optimizer_class, options, clip):
    """Two launches, one more of LANS, one more to clip; they themselves count steps and skipped ones, and keep statistics."""
    named = parameters()
    optimizer = optimizer_class(named, lr=0.1, max_grad_norm=clip, **options)
    give_gradients(named)
    optimizer.step()
    gpu.launches.clear()
    with Operators() as operators:
        optimizer.step()
    assert len(gpu.launches) == 2 + (optimizer_class is largebatch.LANS) + (clip is not None)
    assert operators.names == []


def test_an_address_that_changed_is_all_that_is_copied(gpu):
    """One copy from pinned memory, of the gradients' addresses."""
    optimizer, named = stepped_once()
    num_copies = len(gpu.queued)
    named[1][1].grad = torch.ones_like(named[1][1])
    optimizer.step()
    (copy,) = gpu.queued[num_copies:]
    assert sorted(copy.values.tolist()) == sorted(p.grad.data_ptr() for _, p in named)


@each_algorithm
def test_a_schedule_of_decay_or_betas_does_not_plan_anew(gpu, monkeypatch, optimizer_class, options):
    plans = []
    plan_group = layerwise.plan_group
    monkeypatch.setattr(layerwise, "plan_group", lambda *arguments: plans.append(1) or plan_group(*arguments))
    named = parameters()
    optimizer = optimizer_class(named, lr=0.1, weight_decay=0.1, **options)

    def schedule(step):
        group = optimizer.param_groups[0]
        if "betas" in group:
            group["betas"] = (0.9 - 0.1 * step, 0.99)
        else:
            group["momentum"] = 0.9 - 0.1 * step

    stepped(gpu, optimizer, named, num_steps=5, before=schedule)
    assert len(plans) == 1


def test_gradients_whose_strides_differ_where_nothing_is_strided_are_not_copied(gpu):
    """cuDNN gives 1x1 convolutions gradients in channels_last, which only differ in the strides of dimensions of size 1."""
    weight = torch.nn.Parameter(torch.ones(64, 32, 1, 1, device="cuda"))
    optimizer = largebatch.LAMB([weight], lr=0.1)
    weight.grad = torch.empty_strided(weight.shape, (32, 1, 32, 32), device="cuda")
    assert weight.grad.stride() != weight.stride()
    optimizer.step()
    (call,) = next(iter(optimizer._plans.values())).calls
    assert call.segments.prepared["triton"].copies == {}
