"""The planner's memory, collectives and steps against what a running DeepSpeed engine holds, sends and counts.

Live tensors, torch's CPU allocator and the recorded collectives are looked at from outside; the planner sees the model's
layers and its own probe alone. Neither counts what a CPU kernel takes for itself while it runs: the figures are the same on
every processor.
"""

import json

import pytest
import torch

from largebatch.launch.commands import plan as plan_command
from largebatch.planning.communication import traffic
from largebatch.planning.memory import Layout, memory
from largebatch.planning.training_time import num_steps
from support import engine_memory, launching
from support.engine_memory import NUM_STEPS

MICRO_BATCH, ACCUMULATION = 16, 2

CASES = [
    # model, stage, precision, ranks, optimizer, offload, parts of the model that go through the bucket
    ("lenet", 0, "fp32", 2, "LAMB", "none", 1),
    ("lenet", 1, "fp32", 2, "LARS", "none", 1),
    ("lenet", 1, "bf16", 1, "LAMB", "none", 1),
    ("lenet", 1, "bf16", 2, "LAMB", "none", 1),
    ("lenet", 2, "bf16", 2, "LAMB", "none", 1),
    ("lenet", 3, "bf16", 2, "LAMB", "none", 1),
    ("lenet", 2, "bf16", 2, "LARS", "optimizer", 1),
    ("torchvision:resnet18", 1, "fp32", 1, "LARS", "none", 1),
    ("torchvision:resnet18", 2, "fp32", 2, "LAMB", "none", 4),
]
WRAPPERS = {
    "LARS": "none", "LAMB": "none", "FP16_UnfusedOptimizer": "FP16_UnfusedOptimizer", "BF16_Optimizer": "BF16_Optimizer",
    "DeepSpeedZeroOptimizer": "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3": "DeepSpeedZeroOptimizer_Stage3",
}  # fmt: skip
GATHER_AND_REDUCE = {
    "all_reduce": "allreduce_",
    "all_gather": "_allgather_base_",
    "reduce_scatter": "_reduce_scatter_base_",
}
SCALARS = 3
"""All-reduces of single numbers that DeepSpeed makes in a step: overflow, gradients' norm."""


@pytest.fixture(scope="module")
def probes(rank_pool):
    """The planner's probe, in one of the pool's processes: (model, precision) -> Probe."""
    found = {}

    def of(model, precision):
        if (model, precision) not in found:
            found[model, precision] = rank_pool.run(1, engine_memory.probed, model, precision)[0]
        return found[model, precision]

    return of


@pytest.mark.parametrize(("model", "stage", "precision", "ranks", "optimizer", "offload", "buckets"), CASES)
def test_memory_and_collectives_of_an_engine(
    rank_pool, probes, model, stage, precision, ranks, optimizer, offload, buckets
):
    layers = [p.numel() for p in engine_memory.fresh_model(model).parameters()]
    layout = Layout(stage, precision, ranks, offload, max(max(layers), sum(layers) // buckets))
    zero = {"reduce_bucket_size": layout.bucket_elements} if stage else {}
    zero |= {"offload_optimizer": {"device": "cpu"}} if offload != "none" else {}
    outcomes = rank_pool.run(
        ranks, engine_memory.measured, model, stage, precision,
        optimizer=optimizer, micro_batch=MICRO_BATCH, zero=zero, accumulation=ACCUMULATION,
    )  # fmt: skip
    found = outcomes[0]
    assert found["layers"] == layers and WRAPPERS[found["wrapper"]] == layout.wrapper
    assert found["steps"] == NUM_STEPS and found["samples"] == NUM_STEPS * MICRO_BATCH * ACCUMULATION * ranks

    activations = probes(model, precision).activations(MICRO_BATCH)
    predicted = memory(
        layers, layout, optimizer=optimizer.lower(), activations=activations, accumulation_steps=ACCUMULATION
    )
    largest = max(outcome["peak"] for outcome in outcomes)  # host and device are one here
    assert predicted.total + predicted.host_total == pytest.approx(largest, rel=0.1), (predicted, found)

    expected = dict.fromkeys(GATHER_AND_REDUCE.values(), 0)
    for t in traffic(layers, layout, optimizer=optimizer.lower(), accumulation_steps=ACCUMULATION):
        expected[GATHER_AND_REDUCE[t.collective]] += t.num_calls
    if ranks > 1:
        for name, count in expected.items():
            calls = found["collectives"].get(name, 0)
            assert count <= calls <= count + (SCALARS if name == "allreduce_" else 0), (found["collectives"], expected)


def test_memory_of_a_running_kernel_is_counted_apart():
    """logsumexp holds the exponentials of all its input until it returns; tensors outlive the operation that makes them."""
    inputs, found = torch.randn(500, 1000), {}
    with engine_memory.watched(found):
        sums = inputs.logsumexp(dim=1)
        copy = sums.clone()
        del sums, copy
    assert found["peak"] == 2 * 4 * 500 and found["peak_inside"] >= 4 * 500 * 1000


def test_a_wrong_layout_would_be_seen(rank_pool, probes):
    """The tolerance of a tenth tells one ZeRO stage from the next."""
    layers = [p.numel() for p in engine_memory.fresh_model("lenet").parameters()]
    activations = probes("lenet", "fp32").activations(MICRO_BATCH)
    totals = [
        memory(
            layers,
            Layout(stage, "fp32", 2, "none", sum(layers)),
            optimizer="lamb",
            activations=activations,
            accumulation_steps=ACCUMULATION,
        ).total
        for stage in (1, 2, 3)
    ]
    assert totals[1] / totals[0] > 1.1 and totals[1] / totals[2] > 1.1


@pytest.mark.launcher
def test_a_plan_trains_as_planned(tmp_path, capsys):
    """The written ds_config through the launcher: steps, batch, micro-batch and learning rate as planned."""
    path = tmp_path / "plan.json"
    arguments = ["--recipe", "lenet_digits_lamb_480", "--gpus", "2", "--global-batch", "960", "--epochs", "3"]
    assert plan_command.main([*arguments, "--throughput", "1000", "--output", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["num_steps"] == num_steps(1437, 960, 3) == 5
    launching.train("--deepspeed_config", path, "--output", tmp_path / "run")
    start, steps = launching.events(tmp_path / "run", "start")[0], launching.events(tmp_path / "run", "step")
    assert len(steps) == planned["num_steps"] and start["world_size"] == 2
    config = start["config"]
    assert config["train_batch_size"] == 960 == planned["global_batch"]
    assert config["train_micro_batch_size_per_gpu"] == planned["micro_batch"]
    assert config["gradient_accumulation_steps"] == planned["accumulation_steps"]
    assert config["optimizer"]["params"]["lr"] == pytest.approx(planned["lr"])
