"""What a running DeepSpeed engine really holds, allocates and sends, seen from outside: live tensors, allocator, collectives.

Counted is what is held while no operation runs: tensors and buffers, what a plan speaks of. What an operation takes for
itself and gives back before it returns (weights that oneDNN lays out anew, its scratchpads) hangs on the processor's
instruction set and the number of threads, and is counted apart.
"""

import contextlib
import gc
import math

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.models.catalogue import build_model
from largebatch.planning.activations import probe
from support.engine_runs import fp16_allowed

INPUTS = {"lenet": ((1, 28, 28), 10), "mlp": ((1, 8, 8), 10), "torchvision:resnet18": ((3, 64, 64), 10)}
NUM_STEPS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPERATION = "an operation"


def live_storages():
    """Address -> storage of all CPU tensors that Python can reach."""
    gc.collect()
    storages = {}
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), torch.Tensor):
            continue
        for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu" and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage
    return storages


def bytes_beyond(known):
    """Bytes of all live storages but those of ``known``, which is kept alive so that no address comes back."""
    return sum(s.nbytes() for address, s in live_storages().items() if address not in known)


class MarkedOperations(TorchDispatchMode):
    """Marks the span of every operation in the profile, and lists their names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        with torch.profiler.record_function(OPERATION):
            return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(result):
    """Adds to ``result`` the allocator's peaks above the start, and the collectives.

    "peak" is the most that was held while no operation ran, "peak_inside" the most at all; "collectives" is name -> calls.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(profile_memory=True, activities=activities) as profiler,
        MarkedOperations() as operations,
    ):
        yield
    result["peak"], result["peak_inside"] = peaks_of(profiler.profiler.kineto_results.events())
    names = [name.removeprefix("c10d::") for name in operations.names if name.startswith("c10d::")]
    result["collectives"] = {name: names.count(name) for name in set(names)}


def peaks_of(events):
    """(most bytes while no operation ran, most bytes) that the profiled allocations added up to."""
    changes = []  # (time, operations begun or ended, bytes); at one time, ends come last
    for e in events:
        if e.name() == "[memory]":
            changes.append((e.start_ns(), 0, e.nbytes()))
        elif e.name() == OPERATION:
            changes += [(e.start_ns(), 1, 0), (e.start_ns() + e.duration_ns(), -1, 0)]
    now = running = outside = most = 0
    for _, operations, num_bytes in sorted(changes, key=lambda change: (change[0], -change[1])):
        running += operations
        now += num_bytes
        most = max(most, now)
        if not running:
            outside = max(outside, now)
    return outside, most


def loss_of(model_name, dtype):
    shape, num_classes = INPUTS[model_name]

    def loss(model, micro_batch):
        inputs = torch.randn(micro_batch, *shape).to(dtype, memory_format=torch.channels_last)
        return F.cross_entropy(model(inputs).float(), torch.randint(num_classes, (micro_batch,)))

    return loss


def fresh_model(model_name):
    shape, num_classes = INPUTS[model_name]
    return build_model(model_name, image_shape=shape, num_classes=num_classes)


def measured(model_name, stage, precision, *, optimizer, micro_batch, zero, accumulation=2):
    """Runs NUM_STEPS steps; what all but the first took on this rank.

    Buffers that the network's threads give back late only add to a peak, so a moment's figure is the smallest of the steps.
    """
    import deepspeed

    dtype = DTYPES[precision]
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": optimizer, "params": {"lr": 0.001}},
        "zero_optimization": {"stage": stage, **zero},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        if stage:
            config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    known = live_storages()
    model = fresh_model(model_name)
    loss = loss_of(model_name, dtype)
    with fp16_allowed(), contextlib.redirect_stdout(None):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    moments, inside, collectives = {}, {}, {}
    try:
        for step in range(NUM_STEPS):
            for micro_step in range(accumulation):
                is_last = step == NUM_STEPS - 1 and micro_step == accumulation - 1
                for name in ("backward", "step"):
                    start, seen = bytes_beyond(known) if step else 0, {}
                    with watched(seen) if step else contextlib.nullcontext():
                        if name == "backward":
                            engine.backward(loss(engine, micro_batch))
                        else:
                            engine.step()
                    if step:
                        moment = f"{name} {micro_step}"
                        moments[moment] = min(moments.get(moment, math.inf), start + seen["peak"])
                        inside[moment] = min(inside.get(moment, math.inf), start + seen["peak_inside"])
                    if step == 1:
                        for key, count in seen["collectives"].items():
                            collectives[key] = collectives.get(key, 0) + count
                    del seen
                if is_last:
                    wrapper = type(engine.optimizer).__name__
        return {
            "peak": max(moments.values()),
            "moments": moments,
            "moments_inside": inside,
            "collectives": collectives,
            "wrapper": wrapper,
            "layers": [getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()],
            "steps": engine.global_steps,
            "samples": engine.global_samples,
        }
    finally:
        engine.destroy()


def probed(model_name, precision, micro_batches=(2, 4, 8)):
    """The planner's probe of the same model."""
    dtype = DTYPES[precision]
    model = fresh_model(model_name).to(dtype).train()
    return probe(model, loss_of(model_name, dtype), micro_batches=micro_batches)
