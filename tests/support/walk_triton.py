"""Takes optimizer steps on the Triton kernels' real path, but for the launch itself; prints what happened as JSON lines.

    python walk_triton.py 80|90

For each case {"case", "error", "kernels": those that were launched, "late": compilations after the second step}. In a process
of its own, without TRITON_INTERPRET: Triton's binder, specialisation and compiler work, for a GPU that need not be there.
"""

import json
import os
import sys
import traceback

import torch
import torch.distributed as dist
import triton

import largebatch
from largebatch.kernels import dispatch, triton_gpu, triton_kernels
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import slice_of_concatenation
from support.backends import OPTION_SETS, name_of
from support.triton_stand_in import use

SHAPES = ((37, 13), (1,), (0, 3), (4, 3, 5, 5), (8193,))
NUM_STEPS = 10
ALGORITHMS = [
    (largebatch.LARS, {}), (largebatch.LARS, {"formulation": "2019"}),
    (largebatch.LAMB, {}), (largebatch.NLAMB, {}), (largebatch.NNLAMB, {}),
    (largebatch.LANS, {}),
]  # fmt: skip
KERNELS = [
    triton_kernels.first_kernel,
    triton_kernels.second_kernel,
    triton_kernels.square_kernel,
    triton_kernels.probe_kernel,
]


def num_binaries():
    """How many have been compiled so far in this process."""
    caches = [getattr(kernel, "device_caches", None) or getattr(kernel, "cache", {}) for kernel in KERNELS]
    return sum(len(c[0] if isinstance(c, tuple) else c) for cache in caches for c in cache.values())


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [(f"w{i}", torch.nn.Parameter(torch.ones(shape, dtype=dtype))) for i, shape in enumerate(shapes)]


def changed(group, step):
    """What schedules may change between steps."""
    group["lr"] = 0.01 * (step + 1)
    for name in ("weight_decay", "eps", "momentum", "trust_coefficient"):
        if group.get(name):
            group[name] = group[name] * 0.99
    if "betas" in group:
        group["betas"] = tuple(beta * 0.999 for beta in group["betas"])


def steps(optimizer, named, num_steps=NUM_STEPS, before=lambda step: None):
    """Compilations after the second step."""
    kept = []  # so that no gradient gets the address of an earlier one
    for step in range(num_steps):
        if step == 2:
            after_two = num_binaries()
        changed(optimizer.param_groups[0], step)
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
            kept.append(parameter.grad)
        before(step)
        optimizer.step()
    check_kept_launches(optimizer)
    return num_binaries() - after_two


def check_kept_launches(optimizer):
    """A step whose launches are kept from the last one gives the GPU what it gets by way of Triton's binder."""
    (call,) = next(iter(optimizer._plans.values())).calls
    tables = call.segments.prepared["triton"]
    if tables.steps is None:  # layers that are cut
        return
    kept = launches_of(optimizer)
    tables.steps = None
    assert kept == launches_of(optimizer) and all(launch.arguments for launch in kept)


def launches_of(optimizer):
    """Of a step; of a tensor its address."""
    driver = triton.runtime.driver.active
    num_before = len(driver.launches)
    optimizer.step()
    launches = driver.launches[num_before:]
    return [
        launch._replace(arguments=[a.data_ptr() if torch.is_tensor(a) else a for a in launch.arguments])
        for launch in launches
    ]


def plain(optimizer_class, options, dtype=torch.float32, **more):
    named = parameters(dtype)
    return steps(optimizer_class(named, lr=0.1, **options, **more), named)


def partition(optimizer_class, options, process_group, dtype=torch.float32):
    """A flat partition in which no layer but the first begins at a multiple of 16 bytes."""
    layers = parameters(dtype, ((4097,), (1,), (8193,), (2, 3)))
    optimizer = optimizer_class(layers, lr=0.1, **options)
    numels = [p.numel() for _, p in layers]
    offsets = [sum(numels[:i]) for i in range(len(numels))]
    flat = torch.nn.Parameter(torch.ones(sum(numels)))
    optimizer.await_layout()
    optimizer.param_groups[0]["params"] = [flat]
    layer_map = slice_of_concatenation(numels, offsets, flat.numel(), 0)
    optimizer.attach({flat: Partition(layer_map, tuple(p for _, p in layers), process_group)})
    return steps(optimizer, [("flat", flat)], 4)


def scaled(optimizer_class, options, clip):
    """As torch.amp.GradScaler calls it."""
    named = parameters(torch.float16)
    optimizer = optimizer_class(named, lr=0.1, max_grad_norm=clip, **options)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    return steps(optimizer, named)


def tensor_lr(optimizer_class, options):
    named = parameters()
    optimizer = optimizer_class(named, lr=torch.tensor(0.1), **options)

    def write(step):
        optimizer.param_groups[0]["lr"] = lr.fill_(0.1 * step)

    lr = torch.tensor(0.1)
    return steps(optimizer, named, before=write)


def counts_of_tensors(optimizer_class, options):
    """1, 15, 16 and 17 tensors: binaries beyond those of the first."""
    found = []
    for count in (1, 15, 16, 17):
        named = parameters(shapes=((33,),) * count)
        steps(optimizer_class(named, lr=0.1, **options), named, 3)
        found.append(num_binaries())
    return found[-1] - found[0]


def cases():
    """(name, function that returns the number of late compilations)"""
    yield "probe", lambda: triton_gpu.probe(torch.device("cpu")) or 0
    for optimizer_class, options in OPTION_SETS:
        name = f"{name_of(optimizer_class)} {name_of(options)}"
        yield name, lambda c=optimizer_class, o=options: plain(c, o)
    for optimizer_class, options in ALGORITHMS:
        name = f"{name_of(optimizer_class)}{options.get('formulation', '')}"
        options = options | {"weight_decay": 0.01}
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            yield f"{name} {dtype}", lambda c=optimizer_class, o=options, d=dtype: plain(c, o, d)
        yield f"{name} bf16 state", lambda c=optimizer_class, o=options: plain(c, o, state_dtype="bf16")
        yield f"{name} partition", lambda c=optimizer_class, o=options: partition(c, o, None)
        yield f"{name} sharded", lambda c=optimizer_class, o=options: partition(c, o, dist.group.WORLD)
        yield f"{name} scaler", lambda c=optimizer_class, o=options: scaled(c, o, None)
        yield f"{name} scaler and clip", lambda c=optimizer_class, o=options: scaled(c, o, 1.0)
        yield f"{name} lr tensor", lambda c=optimizer_class, o=options: tensor_lr(c, o)
        yield f"{name} counts", lambda c=optimizer_class, o=options: counts_of_tensors(c, o)


def main(capability):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    driver = use(capability)
    kernels = triton_gpu.TritonKernels()
    dispatch.choose = lambda device_type, requested: kernels
    print(json.dumps({"triton": triton.__version__, "torch": torch.__version__}), flush=True)
    for name, case in cases():
        driver.launches.clear()
        error, late = None, None
        try:
            late = case()
        except Exception:
            error = traceback.format_exc(limit=-6)
        launched = sorted({launch.kernel for launch in driver.launches})
        print(json.dumps({"case": name, "error": error, "kernels": launched, "late": late}), flush=True)
    print(json.dumps({"binaries": num_binaries()}), flush=True)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ
    main(int(sys.argv[1]))
