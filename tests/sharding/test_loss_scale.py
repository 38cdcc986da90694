"""fp16: an overflow changes nothing, and the scale follows the JSON."""

import deepspeed
import pytest
import torch
from packaging.version import Version

from support import engine_runs
from support.problems import relative_error

NUM_STEPS = 12
OVERFLOWS = (3, 7)


def train_with_overflows(algorithm, stage, world_rank_with_inf, hysteresis=1, zero=None):
    """Inside a rank: at two steps the last rank's gradient holds one inf."""
    import torch.distributed as dist

    config = engine_runs.ds_config(algorithm, stage, "fp16", zero=zero)
    config["fp16"]["hysteresis"] = hysteresis
    trace = []
    with engine_runs.engine_for(config, num_steps=NUM_STEPS) as engine:
        optimizer = engine.basic_optimizer
        for step in range(NUM_STEPS):
            gradients = engine_runs.gradients_of(step)
            if step in OVERFLOWS and dist.get_rank() == world_rank_with_inf:
                gradients[4].view(-1)[5] = float("inf")
            engine.backward(engine(gradients))
            engine.step()
            steps = {float(s["step"]) for s in optimizer.state.values() if "step" in s}
            trace.append(
                {
                    "applied": engine.was_step_applied(),
                    "scale": engine.optimizer.loss_scale,
                    "steps": steps,
                    "lr": engine.get_lr()[0],
                    "ratios": {n: f["trust_ratio"] for n, f in optimizer.layer_stats().items()},
                }
            )
        return {"pieces": engine_runs.master_pieces(engine), "trace": trace, "skipped": engine.skipped_steps}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("algorithm", engine_runs.ALGORITHMS)
def test_an_overflow_is_as_if_the_step_had_never_been(rank_pool, algorithm, stage):
    results = rank_pool.run(2, train_with_overflows, algorithm, stage, 1)
    expected, ratios = engine_runs.unsharded(algorithm, NUM_STEPS, skipped=OVERFLOWS)
    assert relative_error(engine_runs.assemble([r["pieces"] for r in results]), expected) < 3e-6
    for result in results:
        trace = result["trace"]
        assert result["skipped"] == 2
        assert [t["applied"] for t in trace] == [step not in OVERFLOWS for step in range(NUM_STEPS)]
        for step in OVERFLOWS:
            assert trace[step]["lr"] == trace[step - 1]["lr"] and trace[step]["steps"] == trace[step - 1]["steps"]
            assert trace[step]["ratios"] == trace[step - 1]["ratios"], "telemetry moved"
            assert trace[step]["scale"] == trace[step - 1]["scale"] / 2
        assert trace[-1]["ratios"] == pytest.approx(ratios[-1], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hysteresis_of_the_json(rank_pool, stage):
    """With hysteresis 2 the first overflow leaves the scale alone, the second halves it."""
    (result, _) = rank_pool.run(2, train_with_overflows, "LARS", stage, 0, hysteresis=2)
    scales = [t["scale"] for t in result["trace"]]
    assert scales[OVERFLOWS[0]] == scales[0] and scales[OVERFLOWS[1]] == scales[0] / 2


def train_with_scale(stage, fp16):
    config = engine_runs.ds_config("LARS", stage, "fp16")
    config["fp16"] = {"enabled": True} | fp16
    scales = []
    with engine_runs.engine_for(config, num_steps=NUM_STEPS) as engine:
        for step in range(NUM_STEPS):
            engine_runs.take_step(engine, step)
            scales.append(engine.optimizer.loss_scale)
        return engine_runs.master_pieces(engine), scales


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "fp16", [{"loss_scale": 64.0}, {"initial_scale_power": 4, "loss_scale_window": 2}], ids=["static", "growing"]
)
def test_static_and_growing_scales_are_exact(rank_pool, stage, fp16):
    """A scale that grows every other step: DeepSpeed by itself halves the gradient each time."""
    results = rank_pool.run(2, train_with_scale, stage, fp16)
    expected, _ = engine_runs.unsharded("LARS", NUM_STEPS)
    assert relative_error(engine_runs.assemble([pieces for pieces, _ in results]), expected) < 3e-6
    scales = results[0][1]
    assert (len(set(scales)) == 1) == ("loss_scale" in fp16)
    if "loss_scale" not in fp16:
        assert scales[-1] >= 16 * 2**4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_nan_without_a_loss_scale_changes_nothing(rank_pool, stage, dtype):
    """ZeRO looks for NaN in fp32 and bf16, too, and drops the whole step on every rank.

    Not so before DeepSpeed 0.19.3 (bf16) and 0.19.8 (fp32): then the poisoned layer, the first, keeps its weights.
    """
    results = rank_pool.run(2, nan_step, stage, dtype)
    assert len({skipped for _, _, skipped in results}) == 1
    for before, after, skipped in results:
        assert skipped == 1 or Version(deepspeed.__version__) < Version("0.19.8" if dtype == "fp32" else "0.19.3")
        for (name, _, a), (_, _, b) in zip(before, after, strict=True):
            assert torch.equal(a, b) == (skipped == 1 or name == "layer0")


def nan_step(stage, dtype):
    import torch.distributed as dist

    with engine_runs.engine_for(engine_runs.ds_config("LAMB", stage, dtype), num_steps=5) as engine:
        engine_runs.take_step(engine, 0)
        before = engine_runs.master_pieces(engine)
        gradients = engine_runs.gradients_of(1)
        if dist.get_rank() == 1:
            gradients[0][3, 3] = float("nan")
        engine.backward(engine(gradients))
        engine.step()
        return before, engine_runs.master_pieces(engine), engine.skipped_steps


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_nan_that_zero_has_not_seen_stops_its_layer_on_every_rank(rank_pool, stage, algorithm):
    """Straight to the optimizer: weights of the poisoned layer stay on both ranks, other layers step as if alone."""
    results = rank_pool.run(2, steps_behind_the_engine, stage, algorithm)
    before, after, without_nan = (engine_runs.assemble([result[i] for result in results]) for i in range(3))
    assert [result[3] for result in results] == [1, 1]
    for layer, (old, new, expected) in enumerate(zip(before, after, without_nan, strict=True)):
        assert torch.equal(new, old if layer == 0 else expected) and not torch.equal(old, expected)


def steps_behind_the_engine(stage, algorithm):
    """Masters before and after a step with a NaN in one element of layer 0, and after one without."""
    pieces = []
    for poison in (True, False):
        with engine_runs.engine_for(engine_runs.ds_config(algorithm, stage), num_steps=5) as engine:
            engine_runs.take_step(engine, 0)
            optimizer = engine.basic_optimizer
            before = engine_runs.master_pieces(engine)
            for flat, partition in optimizer._table.partitions.items():
                flat.grad = torch.zeros_like(flat)
                for s in partition.layer_map.segments:
                    flat.grad[s.start : s.stop] = torch.arange(s.layer_start, s.layer_start + s.numel).cos()
                    if s.layer == 0 and s.layer_start == 0 and poison:
                        flat.grad[s.start + 5] = float("nan")
            optimizer.param_groups[0]["params"] = list(optimizer._table.partitions)
            optimizer.step()
            pieces.append(engine_runs.master_pieces(engine))
            if poison:
                num_skipped = optimizer.num_skipped_layers
    return before, *pieces, num_skipped
