"""Runs inside a rank: save at one layout, resume at another, and what is compared with the run that was not interrupted."""

import torch
from torch import nn

from largebatch.engine.wrappers import stepped_tensors
from largebatch.optim.registry import OPTIMIZERS
from support import engine_runs

FIRST, REST = 3, 3
"""Steps before the checkpoint and after it."""


def what_is_compared(engine):
    """Masters, the trust ratios of the last step, and the engine's own counts."""
    optimizer = engine.basic_optimizer
    stats = optimizer.layer_stats() if hasattr(optimizer, "layer_stats") else {}
    return {
        "pieces": engine_runs.master_pieces(engine) if stats else master_pieces_of_baseline(engine),
        "ratios": {name: figures["trust_ratio"] for name, figures in stats.items()},
        "counts": (engine.global_steps, engine.skipped_steps, engine.lr_scheduler.applied),
        "lr": [group["lr"] for group in optimizer.param_groups],
        "decays": [group["weight_decay"] for group in optimizer.param_groups],
        "loss_scale": engine.optimizer.loss_scale if engine.fp16_enabled() else None,
    }


def master_pieces_of_baseline(engine):
    pieces = []
    for stepped in stepped_tensors(engine.optimizer):
        names = [engine.param_names[p] for p in stepped.partition.parameters]
        for s in stepped.partition.layer_map.segments:
            values = stepped.tensor.detach().reshape(-1)[s.start : s.stop].clone().float()
            pieces.append((names[s.layer], s.layer_start, values))
    return pieces


def save_at(algorithm, layout, folder, tag="saved", num_groups=1, num_steps=FIRST):
    """Trains from the start and saves; goes on to the end and returns that end."""
    with engine_runs.engine_for(
        engine_runs.ds_config(algorithm, **layout), num_groups=num_groups, num_steps=FIRST + REST
    ) as engine:
        for step in range(num_steps):
            engine_runs.take_step(engine, step)
        engine.save_checkpoint(folder, tag=tag)
        for step in range(num_steps, FIRST + REST):
            engine_runs.take_step(engine, step)
        return what_is_compared(engine)


def resume_at(algorithm, layout, folder, tag="saved", num_groups=1, num_steps=FIRST, num_ahead=0):
    """A fresh engine, or one that has trained already, loads and goes on to the end."""
    with engine_runs.engine_for(
        engine_runs.ds_config(algorithm, **layout), num_groups=num_groups, num_steps=FIRST + REST
    ) as engine:
        for step in range(num_ahead):
            engine_runs.take_step(engine, step)
        path, client_state = engine.load_checkpoint(folder, tag=tag)
        assert path.startswith(f"{folder}/{tag}/") and "largebatch_layout" not in client_state
        models_own = weights_of_model(engine)
        for step in range(num_steps, FIRST + REST):
            engine_runs.take_step(engine, step)
        return what_is_compared(engine) | {"model": models_own}


def weights_of_model(engine):
    """The model's own weights, whole, in its own precision; under ZeRO 3 gathered. A collective."""
    import deepspeed

    found = []
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found.append(parameter.detach().clone().cpu())
    return found


def uninterrupted(algorithm, num_groups=1):
    """The same training in plain PyTorch: weights after FIRST steps, at the end, and the last step's trust ratios."""
    model, optimizer = plain(algorithm, num_groups)
    train_plain(model, optimizer, algorithm, range(FIRST))
    first = [p.detach().clone() for p in model.layers]
    train_plain(model, optimizer, algorithm, range(FIRST, FIRST + REST))
    ratios = {name: figures["trust_ratio"] for name, figures in optimizer.layer_stats().items()}
    return first, [p.detach() for p in model.layers], ratios


def regrouped(algorithm, before, now):
    """Weights at the end if the param groups change after FIRST steps, and with them the second group's weight decay."""
    model, optimizer = plain(algorithm, 2)
    decays = {
        1: [engine_runs.OPTIONS[algorithm]["weight_decay"]] * 2,
        2: [g["weight_decay"] for g in optimizer.param_groups],
    }
    for num_groups, steps in ((before, range(FIRST)), (now, range(FIRST, FIRST + REST))):
        for group, decay in zip(optimizer.param_groups, decays[num_groups], strict=True):
            group["weight_decay"] = decay
        train_plain(model, optimizer, algorithm, steps)
    return [p.detach() for p in model.layers]


def plain(algorithm, num_groups):
    model = engine_runs.LinearLoss()
    groups = engine_runs.param_groups(model, num_groups)
    return model, OPTIMIZERS[algorithm.lower()](groups, model=model, **engine_runs.OPTIONS[algorithm])


def train_plain(model, optimizer, algorithm, steps):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = engine_runs.learning_rate(step, FIRST + REST, engine_runs.OPTIONS[algorithm]["lr"])
        for parameter, gradient in zip(model.layers, engine_runs.gradients_of(step), strict=True):
            parameter.grad = gradient
        optimizer.step()


FROZEN, BUFFER = torch.arange(21.0).view(7, 3), torch.arange(5.0)


class WithBuffers(engine_runs.LinearLoss):
    """A model with a parameter that is not trained and a buffer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(FROZEN.clone(), requires_grad=False)
        self.register_buffer("buffer", BUFFER.clone())

    @property
    def layers(self):
        return [p for p in self.parameters() if p.requires_grad]


def save_with_buffers(stage, folder):
    model = WithBuffers()
    with torch.no_grad():
        model.frozen += 1
        model.buffer += 1
    with engine_runs.engine_for(engine_runs.ds_config("LAMB", stage), model=model, num_steps=4) as engine:
        engine_runs.take_step(engine, 0)
        engine.save_checkpoint(folder, tag="saved")


def load_with_buffers(stage, folder):
    """What is not trained, after a load of everything and of the weights alone."""
    import deepspeed

    config, found = engine_runs.ds_config("LAMB", stage), {}
    for name, options in (("weights_only", {"load_module_only": True}), ("frozen", {})):
        model = WithBuffers()
        with engine_runs.engine_for(config, model=model, num_steps=4) as engine:
            engine.load_checkpoint(folder, tag="saved", **options)
            with deepspeed.zero.GatheredParameters([model.frozen], enabled=hasattr(model.frozen, "ds_id")):
                found[name] = model.frozen.detach().clone()
            found["buffer"] = model.buffer.clone()
            if name == "weights_only":
                found["has_state"] = any(s["exp_avg"].any() for s in engine.basic_optimizer.state.values() if s)
    return found


def same_bits(results, others):
    """Whether two runs at the same layout ended in the same masters and trust ratios on every rank."""
    return all(
        a["ratios"] == b["ratios"]
        and len(a["pieces"]) == len(b["pieces"])
        and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a["pieces"], b["pieces"], strict=True))
        for a, b in zip(results, others, strict=True)
    )
