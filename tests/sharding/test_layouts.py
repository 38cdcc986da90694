"""The corners of DeepSpeed's layouts: each against unsharded training, through the real engine."""

import pytest
import torch
from torch import nn

from largebatch.planning.communication import SUMS_OF_SQUARES
from support import engine_runs
from support.problems import relative_error

NUM_STEPS = 10
BOUND = 3e-6

CORNERS = {
    "zero1-round-robin": dict(stage=1, zero={"round_robin_gradients": True}),
    "zero2-round-robin": dict(stage=2, zero={"round_robin_gradients": True}),
    "zero2-bf16-round-robin-offload": dict(
        stage=2, dtype="bf16", zero={"round_robin_gradients": True, "offload_optimizer": {"device": "cpu"}}
    ),
    "zero2-small-buckets": dict(stage=2, zero={"reduce_bucket_size": 100, "allgather_bucket_size": 100}),
    "zero2-all-reduce": dict(stage=2, zero={"reduce_scatter": False, "contiguous_gradients": False}),
    "zero2-overlap": dict(stage=2, zero={"overlap_comm": True}),
    "zero1-alignment": dict(stage=1, dtype="bf16", zero={"parameter_alignment": True}),
    "zero1-bf16-fp32-accumulation": dict(stage=1, dtype="bf16", grad_accum="fp32"),
    "zero2-bf16-fp32-accumulation": dict(stage=2, dtype="bf16", grad_accum="fp32"),
    "zero3-bf16-fp32-accumulation": dict(stage=3, dtype="bf16", grad_accum="fp32"),
    "zero3-one-sub-group": dict(stage=3),
    "zero3-sub-group-per-layer": dict(stage=3, zero={"sub_group_size": 1}),
    "zero3-persistent": dict(stage=3, zero={"stage3_param_persistence_threshold": 10**6}),
    "zero3-nothing-persistent": dict(stage=3, zero={"stage3_param_persistence_threshold": 0}),
    "zero3-offload-everything": dict(
        stage=3, dtype="bf16", zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    ),
    "zero3-accumulation": dict(stage=3, accumulation=4),
    "zero1-accumulation": dict(stage=1, accumulation=4),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
def test_second_copies_within_a_node(rank_pool, algorithm):
    """hpZ: four ranks in groups of two that keep another copy of the parameters; masters are cut over all four."""
    options = dict(stage=3, dtype="bf16", num_groups=2, zero={"zero_hpz_partition_size": 2})
    results = rank_pool.run(4, engine_runs.train, algorithm, num_steps=NUM_STEPS, **options)
    expected, ratios = engine_runs.unsharded(algorithm, NUM_STEPS, 2)
    assert relative_error(engine_runs.assemble([r["pieces"] for r in results]), expected) < BOUND
    assert all(r["ratios"] == ratios for r in results)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
@pytest.mark.parametrize("corner", CORNERS)
def test_corner(rank_pool, corner, algorithm, world_size):
    options = {"dtype": "fp32", "num_groups": 2} | CORNERS[corner]
    results = rank_pool.run(world_size, engine_runs.train, algorithm, num_steps=NUM_STEPS, **options)
    expected, _ = engine_runs.unsharded(algorithm, NUM_STEPS, 2)
    assert relative_error(engine_runs.assemble([r["pieces"] for r in results]), expected) < BOUND
    assert all(r["ratios"] == results[0]["ratios"] for r in results)


TINY = ((1,), (2,), (1, 1))


def train_model(kind, stage, num_steps, world_config=None):
    """Inside a rank: models of other make than the matrix's; returns pieces by name."""
    import contextlib

    import deepspeed

    config = engine_runs.ds_config("LAMB", stage, **(world_config or {}))
    context = deepspeed.zero.Init(config_dict_or_path=config) if kind == "zero-init" else contextlib.nullcontext()
    with context:
        model = {
            "tiny": lambda: engine_runs.LinearLoss(TINY),
            "zero-init": engine_runs.LinearLoss,
            "frozen": Frozen,
            "unused": Unused,
            "tied": Tied,
        }[kind]()
    shapes = TINY if kind == "tiny" else engine_runs.SHAPES
    trainable = [p for p in model.parameters() if p.requires_grad]
    with engine_runs.fp16_allowed():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=trainable,
            config=config,
            lr_scheduler=lambda wrapped: engine_runs.ScheduleForTests(wrapped, num_steps, 0.02),
        )
    for step in range(num_steps):
        engine_runs.take_step(engine, step, shapes)
    pieces = engine_runs.master_pieces(engine)
    stats = engine.basic_optimizer.layer_stats()
    engine.destroy()
    return pieces, stats


def plain_model(kind, num_steps):
    """The same without DeepSpeed; parameters without a gradient get zeros, as its engines give them."""
    import largebatch

    model = {"tiny": lambda: engine_runs.LinearLoss(TINY), "zero-init": engine_runs.LinearLoss, "frozen": Frozen,
             "unused": Unused, "tied": Tied}[kind]()  # fmt: skip
    shapes = TINY if kind == "tiny" else engine_runs.SHAPES
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = largebatch.LAMB(trainable, model=model, **engine_runs.ALGORITHMS["LAMB"])
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = engine_runs.learning_rate(step, num_steps, 0.02)
        optimizer.zero_grad()
        model(engine_runs.gradients_of(step, shapes)).backward()
        for parameter in trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return {n: p.detach().reshape(-1) for n, p in model.named_parameters() if p.requires_grad}, optimizer.layer_stats()


class Frozen(engine_runs.LinearLoss):
    """Most layers frozen, as under LoRA: three small ones are trained."""

    def __init__(self):
        super().__init__()
        for i, parameter in enumerate(self.layers):
            parameter.requires_grad_(i in (3, 5, 8))


class Unused(engine_runs.LinearLoss):
    """One layer never takes part in the loss."""

    def forward(self, gradients):
        return sum(
            (p * g.to(p.dtype)).sum() for i, (p, g) in enumerate(zip(self.layers, gradients, strict=True)) if i != 4
        )


class Use(nn.Module):
    """A module that owns a weight and uses it in its own forward, where ZeRO 3 gathers it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, gradient):
        return (self.weight * gradient.to(self.weight.dtype)).sum()


class Tied(nn.Module):
    """One weight under two names, used by two modules, and a second weight that is not tied."""

    def __init__(self):
        super().__init__()
        first, second = list(engine_runs.LinearLoss().parameters())[:2]
        self.embedding, self.head, self.other = Use(first), Use(first), Use(second)

    def forward(self, gradients):
        return self.embedding(gradients[0]) + self.head(gradients[0]) + self.other(gradients[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["tiny", "frozen", "unused", "tied", "zero-init"])
def test_model(rank_pool, kind, stage, world_size):
    if kind == "zero-init" and stage != 3:
        pytest.skip("zero.Init partitions parameters, which is stage 3")
    results = rank_pool.run(world_size, train_model, kind, stage, NUM_STEPS)
    expected, expected_stats = plain_model(kind, NUM_STEPS)
    found = {name: torch.full_like(values, float("nan")) for name, values in expected.items()}
    for pieces, stats in results:
        assert stats.keys() == expected_stats.keys()
        for name, start, values in pieces:
            if name in found:
                found[name][start : start + len(values)] = values
    assert relative_error([found[n] for n in expected], list(expected.values())) < BOUND


def collectives_of_a_step(algorithm, stage, num_groups):
    """Inside a rank: what the optimizer's own step sends, counted at torch.distributed."""
    import torch.distributed as dist

    config = engine_runs.ds_config(algorithm, stage, zero={"sub_group_size": 700} if stage == 3 else {})
    sent = []
    with engine_runs.engine_for(config, num_groups=num_groups, num_steps=10) as engine:
        engine_runs.take_step(engine, 0)
        optimizer = engine.basic_optimizer
        originals = {
            name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast", "reduce_scatter_tensor")
        }
        step, calls = optimizer.step, []

        def counted(name, original):
            def call(tensor, *args, **kwargs):
                sent.append((name, tensor.dtype, tensor.numel()))
                return original(tensor, *args, **kwargs)

            return call

        def watched_step(*args, **kwargs):
            for name, original in originals.items():
                setattr(dist, name, counted(name, original))
            try:
                calls.append(1)
                return step(*args, **kwargs)
            finally:
                for name, original in originals.items():
                    setattr(dist, name, original)

        optimizer.step = watched_step
        engine_runs.take_step(engine, 1)
        return sent, len(calls)


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("algorithm", engine_runs.ALGORITHMS)
def test_one_all_reduce_of_16_bytes_a_layer_and_two_for_lans(rank_pool, algorithm, stage, num_groups):
    results = rank_pool.run(2, collectives_of_a_step, algorithm, stage, num_groups)
    for sent, num_calls in results:
        if stage == 0:
            assert sent == [], "every rank holds whole layers"
        else:
            sums = SUMS_OF_SQUARES[algorithm.lower()]  # of LANS in two phases
            assert len(sent) == num_calls * len(sums), "one collective for each phase of a call of the optimizer's step"
            assert {(name, dtype) for name, dtype, _ in sent} == {("all_reduce", torch.float64)}
            assert sum(numel for *_, numel in sent) == sum(sums) * len(engine_runs.SHAPES), "fp64 numbers of each layer"
    (alone,) = rank_pool.run(1, collectives_of_a_step, algorithm, stage, num_groups)
    assert alone[0] == [], "nothing is sent in a world of one"


def naive_masters(peer, stage, num_steps):
    """Inside a rank: an optimizer that takes norms over what it is handed."""
    import deepspeed

    config = engine_runs.ds_config("LAMB", stage, extra={"zero_allow_untested_optimizer": True})
    if peer == "timm":
        from timm.optim import Lamb

        del config["optimizer"]
        build = lambda model: Lamb(  # noqa: E731
            model.parameters(), max_grad_norm=None, always_adapt=True, **engine_runs.ALGORITHMS["LAMB"]
        )
    else:
        build = None
    with engine_runs.engine_for(config, optimizer=build, num_steps=num_steps) as engine:
        if peer == "ours-without-map":
            optimizer = engine.basic_optimizer
            kept, optimizer._table.partitions = optimizer._table.partitions, {}
            groups = [next(iter(optimizer._table.of_parameter.values()))] * len(kept)
            for layer, flat in zip(groups, kept, strict=True):
                layer.shape = flat.shape
            optimizer._table.groups = [[layer] for layer in groups]
        for step in range(num_steps):
            engine_runs.take_step(engine, step)
        state = {n: deepspeed.utils.safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
        return [state[f"layer{i}"].float() for i in range(len(engine_runs.SHAPES))]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("peer", ["timm", "ours-without-map"])
def test_the_naive_control_fails_by_orders_of_magnitude(rank_pool, peer, stage, world_size):
    expected, _ = engine_runs.unsharded("LAMB", NUM_STEPS)
    found = rank_pool.run(world_size, naive_masters, peer, stage, NUM_STEPS)[0]
    error = max(
        ((a - b).abs().max() / b.abs().max()).nan_to_num(1e9).item() for a, b in zip(found, expected, strict=True)
    )
    assert error > 1e4 * BOUND


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("algorithm", engine_runs.ALGORITHMS)
def test_two_runs_end_in_the_same_bits(rank_pool, algorithm, stage):
    one, two = (rank_pool.run(3, engine_runs.train, algorithm, stage, "fp32", NUM_STEPS) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert a["ratios"] == b["ratios"]
        for (name, start, values), (other_name, other_start, other) in zip(a["pieces"], b["pieces"], strict=True):
            assert (name, start) == (other_name, other_start) and torch.equal(values, other)
