"""Runs inside a rank: the real DeepSpeed engine on a model whose gradients are the same bits in every dtype and layout.

The loss is linear in the parameters, so a parameter's gradient is a constant that the test chooses. The constants are
small multiples of 12 over a power of two: bf16 and fp16 hold them exactly, and so they do their sums over up to four
ranks and their quotients. What is left to differ from unsharded training is the optimizer alone.
"""

import contextlib

import torch
from torch import nn

from largebatch.optim.registry import OPTIMIZERS
from support import own_rules

SHAPES = ((37, 13), (37,), (13, 37), (1,), (203, 3), (6, 5, 3), (7,), (64,), (2, 2), (90, 11))
GROUP_BORDER = 4
"""With two param groups, where the second begins."""

SECOND_GROUP = {"weight_decay": 0.0}

ALGORITHMS = {
    "LARS": {"lr": 2.0, "momentum": 0.9, "weight_decay": 5e-3},
    "LAMB": {"lr": 0.02, "weight_decay": 0.05},
    "NLAMB": {"lr": 0.02, "betas": [0.9, 0.99], "weight_decay": 0.05},
    "NNLAMB": {"lr": 0.02, "betas": [0.9, 0.99], "weight_decay": 0.05},
    # the compiled kernels are those of own_rules; here the bits of all cuts are compared
    "LANS": {"lr": 0.02, "betas": [0.9, 0.99], "weight_decay": 0.05},
}
OPTIONS = ALGORITHMS | own_rules.OPTIONS


class LinearLoss(nn.Module):
    """Parameters of odd shapes with unequal norms, and a loss whose gradient is what the caller says."""

    def __init__(self, shapes=SHAPES):
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        scales = (0.05, 1.0, 3.0, 0.25, 16.0, 0.01, 0.5, 1.0, 2.0, 0.1)
        for i, shape in enumerate(shapes):
            # rounded to bf16, so that every compute dtype starts from the same master weights
            values = (torch.randn(shape, generator=generator) * scales[i % 10]).bfloat16().float()
            # attributes of this very module, so that ZeRO 3 gathers them for its forward
            setattr(self, f"layer{i}", nn.Parameter(values))

    @property
    def layers(self):
        return list(self.parameters())

    def forward(self, gradients):
        return sum((p * g.to(p.dtype)).sum() for p, g in zip(self.layers, gradients, strict=True))


def gradients_of(step, shapes=SHAPES):
    """One exact constant gradient a layer, with another size in each layer."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        torch.randint(-10, 11, shape, generator=generator) * 12.0 / 2 ** (5 + 2 * (i % 4))
        for i, shape in enumerate(shapes)
    ]


def learning_rate(step, num_steps, peak):
    warm = num_steps // 5
    return peak * ((step + 1) / warm if step < warm else (1 - (step - warm) / (num_steps - warm)) ** 2)


def param_groups(model, num_groups):
    parameters = model.layers
    if num_groups == 1:
        return [{"params": parameters}]
    return [{"params": parameters[:GROUP_BORDER]}, {"params": parameters[GROUP_BORDER:], **SECOND_GROUP}]


def unsharded(algorithm, num_steps, num_groups=1, skipped=(), shapes=SHAPES, dtype=torch.float32):
    """The same training in plain PyTorch: final weights and the trust ratios of every step."""
    model = LinearLoss(shapes).to(dtype)
    options = OPTIONS[algorithm]
    optimizer = OPTIMIZERS[algorithm.lower()](param_groups(model, num_groups), model=model, **options)
    ratios, applied = [], 0
    for step in range(num_steps):
        if step in skipped:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(applied, num_steps, options["lr"])
        applied += 1
        for parameter, gradient in zip(model.layers, gradients_of(step, shapes), strict=True):
            parameter.grad = gradient.to(dtype)
        optimizer.step()
        ratios.append({name: figures["trust_ratio"] for name, figures in optimizer.layer_stats().items()})
    return [p.detach().clone() for p in model.layers], ratios


class ScheduleForTests:
    """The changing learning rate as a DeepSpeed client scheduler."""

    def __init__(self, optimizer, num_steps, peak):
        self.optimizer, self.num_steps, self.peak, self.applied = optimizer, num_steps, peak, 0
        self._set()

    def _set(self):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(min(self.applied, self.num_steps - 1), self.num_steps, self.peak)

    def step(self):
        self.applied += 1
        self._set()

    def get_last_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self):
        return {"applied": self.applied}

    def load_state_dict(self, state):
        self.applied = state["applied"]
        self._set()


def ds_config(algorithm, stage, dtype="fp32", *, zero=None, accumulation=1, grad_accum=None, extra=None):
    world = torch.distributed.get_world_size()
    config = {
        "train_batch_size": world * accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": algorithm, "params": dict(OPTIONS.get(algorithm, {}))},
        "zero_optimization": {"stage": stage, **(zero or {})},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1, "loss_scale_window": 10}
    if grad_accum:
        config["data_types"] = {"grad_accum_dtype": grad_accum}
    return config | (extra or {})


@contextlib.contextmanager
def fp16_allowed():
    """The CPU accelerator refuses fp16 although torch computes it there."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


@contextlib.contextmanager
def engine_for(config, *, num_groups=1, model=None, num_steps=1, optimizer=None):
    """A DeepSpeed engine under the test schedule, taken down afterwards."""
    import deepspeed

    model = LinearLoss() if model is None else model
    peak = OPTIONS.get(config.get("optimizer", {}).get("type", "LAMB"), {"lr": 0.02})["lr"]
    with fp16_allowed():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=param_groups(model, num_groups),
            config=config,
            optimizer=optimizer(model) if optimizer else None,
            lr_scheduler=lambda wrapped: ScheduleForTests(wrapped, num_steps, peak),
        )
        try:
            yield engine
        finally:
            engine.destroy()


def take_step(engine, step, shapes=SHAPES):
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine([g.to(engine.device) for g in gradients_of(step, shapes)]))
        engine.step()


def master_pieces(engine):
    """[(layer name, first element, values)] of the fp32 masters that this rank owns, read through the layer map."""
    optimizer = engine.basic_optimizer
    if not optimizer._table.partitions:
        return [(name, 0, p.detach().reshape(-1).clone()) for name, p in engine.module.named_parameters()]
    names = {id(p): layer.policy.name for p, layer in optimizer._table.of_parameter.items()}
    pieces = []
    for tensor, partition in optimizer._table.partitions.items():
        flat = tensor.detach().reshape(-1)
        for s in partition.layer_map.segments:
            values = flat[s.start : s.stop].clone().float()
            pieces.append((names[id(partition.parameters[s.layer])], s.layer_start, values))
    return pieces


def assemble(pieces_of_ranks, shapes=SHAPES):
    """Whole layers from the pieces of all ranks; asserts that nothing is missing and that copies agree bit for bit."""
    layers = [torch.full((torch.Size(s).numel(),), float("nan")) for s in shapes]
    for pieces in pieces_of_ranks:
        for name, start, values in pieces:
            layer = layers[int(name.removeprefix("layer"))]
            old = layer[start : start + len(values)]
            assert torch.isnan(old).all() or torch.equal(old, values), name
            layer[start : start + len(values)] = values
    assert not any(torch.isnan(layer).any() for layer in layers)
    return [layer.view(s) for layer, s in zip(layers, shapes, strict=True)]


def train(algorithm, stage, dtype, num_steps, *, num_groups=1, **config_options):
    """Trains and returns what a test compares: pieces of the masters and the trust ratios of every step."""
    config = ds_config(algorithm, stage, dtype, **config_options)
    with engine_for(config, num_groups=num_groups, num_steps=num_steps) as engine:
        ratios = []
        for step in range(num_steps):
            take_step(engine, step)
            stats = engine.basic_optimizer.layer_stats()
            ratios.append({name: figures["trust_ratio"] for name, figures in stats.items()})
        return {"pieces": master_pieces(engine), "ratios": ratios, "wrapper": type(engine.optimizer).__name__}
