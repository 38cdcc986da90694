"""What a running DeepSpeed engine really holds, allocates and sends, seen from outside: live tensors, allocator, collectives."""

import contextlib
import gc
import math

import torch
import torch.nn.functional as F

from largebatch.models.registry import build_model
from largebatch.planning.activations import probe
from support.engine_runs import fp16_allowed

INPUTS = {"lenet": ((1, 28, 28), 10), "mlp": ((1, 8, 8), 10), "torchvision:resnet18": ((3, 64, 64), 10)}
NUM_STEPS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


@contextlib.contextmanager
def watched(result):
    """Adds the allocator's peak above the start to result["peak"], and the collectives to result["collectives"]."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, record_shapes=True, activities=activities) as profiler:
        yield
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for _, num_bytes in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += num_bytes
        peak = max(peak, now)
    result["peak"] = peak
    names = [e.name.removeprefix("c10d::") for e in profiler.events() if e.name.startswith("c10d::")]
    result["collectives"] = {name: names.count(name) for name in set(names)}


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
    moments, collectives = {}, {}
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
                    if step == 1:
                        for key, count in seen["collectives"].items():
                            collectives[key] = collectives.get(key, 0) + count
                    del seen
                if is_last:
                    wrapper = type(engine.optimizer).__name__
        return {
            "peak": max(moments.values()),
            "moments": moments,
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
