"""Layers cut by tensor parallelism, under ZeRO and without: the numbers of unsharded training, through the real engine."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from support import engine_runs
from support.problems import relative_error

NUM_STEPS = 10
BOUND = 3e-6
CUT = (0, 2, 4, 7, 9)
"""Layers of engine_runs.LinearLoss that are cut along their first dimension; the rest is on every rank."""


class Megatron:
    """What Megatron-LM gives to deepspeed.initialize(mpu=): neighbouring ranks share layers, the others data."""

    def __init__(self, tensor_size):
        world, rank = dist.get_world_size(), dist.get_rank()
        starts = range(0, world, tensor_size)
        self.tensor = self._mine([list(range(s, s + tensor_size)) for s in starts], rank)
        self.data = self._mine([list(range(i, world, tensor_size)) for i in range(tensor_size)], rank)

    @staticmethod
    def _mine(rank_lists, rank):
        groups = [dist.new_group(ranks) for ranks in rank_lists]
        return next(g for g, ranks in zip(groups, rank_lists, strict=True) if rank in ranks)

    def get_tensor_model_parallel_group(self):
        return self.tensor

    def get_tensor_model_parallel_world_size(self):
        return dist.get_world_size(self.tensor)

    def get_tensor_model_parallel_rank(self):
        return dist.get_rank(self.tensor)

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_world_size(self):
        return dist.get_world_size(self.data)

    def get_data_parallel_rank(self):
        return dist.get_rank(self.data)

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank


class CutLoss(engine_runs.LinearLoss):
    """This rank's parts of the layers of LinearLoss."""

    def __init__(self, mpu, mark="tensor_model_parallel"):
        super().__init__()
        self.mpu = mpu
        for i in CUT:
            part = nn.Parameter(self.part(getattr(self, f"layer{i}").detach()).clone())
            setattr(part, mark, True)
            setattr(self, f"layer{i}", part)

    def part(self, whole):
        return whole.tensor_split(self.mpu.get_tensor_model_parallel_world_size())[
            self.mpu.get_tensor_model_parallel_rank()
        ]

    def forward(self, gradients):
        return super().forward([self.part(g) if i in CUT else g for i, g in enumerate(gradients)])


@contextlib.contextmanager
def engine_with(mpu, model, algorithm, stage, dtype, extra=None):
    import deepspeed

    config = engine_runs.ds_config(algorithm, stage, dtype) | {"train_batch_size": mpu.get_data_parallel_world_size()}
    peak = engine_runs.ALGORITHMS[algorithm]["lr"]
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.layers,
            config=config | (extra or {}),
            mpu=mpu,
            lr_scheduler=lambda wrapped: engine_runs.ScheduleForTests(wrapped, NUM_STEPS, peak),
        )
        try:
            yield engine
        finally:
            engine.destroy()
    finally:
        deepspeed.utils.groups.mpu = None  # kept by DeepSpeed for every later engine of the process


def train(algorithm, stage, dtype, tensor_size, mark="tensor_model_parallel"):
    mpu = Megatron(tensor_size)
    with engine_with(mpu, CutLoss(mpu, mark), algorithm, stage, dtype) as engine:
        ratios = []
        for step in range(NUM_STEPS):
            engine_runs.take_step(engine, step)
            stats = engine.basic_optimizer.layer_stats()
            ratios.append({name: figures["trust_ratio"] for name, figures in stats.items()})
        return mpu.get_tensor_model_parallel_rank(), engine_runs.master_pieces(engine), ratios


def assembled(results, tensor_size):
    """Whole layers from the pieces of all ranks."""
    parts = []
    for tensor_rank in range(tensor_size):
        shapes = [
            torch.empty(shape).tensor_split(tensor_size)[tensor_rank].shape if i in CUT else shape
            for i, shape in enumerate(engine_runs.SHAPES)
        ]
        parts.append(engine_runs.assemble([pieces for rank, pieces, _ in results if rank == tensor_rank], shapes))
    for i, copies in enumerate(zip(*parts, strict=True)):
        assert i in CUT or all(torch.equal(copies[0], copy) for copy in copies)
    return [torch.cat(p) if i in CUT else p[0] for i, p in enumerate(zip(*parts, strict=True))]


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
@pytest.mark.parametrize("world_size, tensor_size", [(2, 2), (3, 3), (4, 2)])
def test_cut_layers_step_as_whole_ones(rank_pool, world_size, tensor_size, stage, dtype, algorithm):
    results = rank_pool.run(world_size, train, algorithm, stage, dtype, tensor_size)
    expected, ratios = engine_runs.unsharded(algorithm, NUM_STEPS)
    assert relative_error(assembled(results, tensor_size), expected) < BOUND
    assert all(found == ratios for _, _, found in results)


def test_the_older_mark(rank_pool):
    results = rank_pool.run(2, train, "LAMB", 1, "fp32", 2, "model_parallel")
    assert all(found == engine_runs.unsharded("LAMB", NUM_STEPS)[1] for _, _, found in results)


def test_without_marks_the_norms_would_be_of_parts(rank_pool):
    """The control: marks on nothing that is cut. The norms are those of parts, and the test above would see it."""
    results = rank_pool.run(2, train_with_marks_on_the_wrong_layers)
    expected, _ = engine_runs.unsharded("LAMB", NUM_STEPS)
    assert relative_error(assembled(results, 2), expected) > 100 * BOUND


def train_with_marks_on_the_wrong_layers():
    mpu = Megatron(2)
    model = CutLoss(mpu, mark="some_other_attribute")
    model.layer1.tensor_model_parallel = True
    with engine_with(mpu, model, "LAMB", 1, "fp32") as engine:
        for step in range(NUM_STEPS):
            engine_runs.take_step(engine, step)
        return mpu.get_tensor_model_parallel_rank(), engine_runs.master_pieces(engine), None


def message_without_marks(state_dtype, mark):
    mpu = Megatron(2)
    extra = {"optimizer": {"type": "LAMB", "params": {"lr": 0.01, "state_dtype": state_dtype}}}
    with (
        pytest.raises((ValueError, RuntimeError)) as error,
        engine_with(mpu, CutLoss(mpu, mark), "LAMB", 1, "fp32", extra) as engine,
    ):
        engine_runs.take_step(engine, 0)
    return str(error.value)


@pytest.mark.parametrize(
    "state_dtype, mark, words",
    [
        ("fp32", "some_other_attribute", "no parameter is marked as cut"),
        ("bf16", "tensor_model_parallel", "Set state_dtype to 'fp32'"),
    ],
)
def test_what_is_refused(rank_pool, state_dtype, mark, words):
    assert all(words in message for message in rank_pool.run(2, message_without_marks, state_dtype, mark))
