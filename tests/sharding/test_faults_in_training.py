"""The trainer when a rank is slow, gradients burst into NaN, or a checkpoint cannot be written, two ranks."""

import json
import math
import os
import time

import pytest
import torch
import torch.distributed as dist

from largebatch.launch.trainer import slow_ranks
from largebatch.launch.trainer.classification import Classification
from largebatch.launch.trainer.saving import step_folders
from support import trainer_runs
from support.trainer_runs import patched

ARGUMENTS = (
    "--deepspeed_config", "lenet_digits_lars_480", "--set", "largebatch.model=mlp", "--set", "train_batch_size=96",
    "--set", "train_micro_batch_size_per_gpu=24", "--set", "tensorboard.enabled=false",
)  # fmt: skip


def events(folder, kind):
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        return [record for record in map(json.loads, file) if record["event"] == kind]


def train_with_a_slow_rank(folder, seconds):
    loss = Classification.loss

    def slowed(self, model, batch, *, dtype):
        if dist.get_rank() == 1:
            time.sleep(seconds)
        return loss(self, model, batch, dtype=dtype)

    with patched(Classification, loss=slowed), patched(slow_ranks, SECONDS_BETWEEN_LOOKS=0.5):
        trainer_runs.run_trainer([*ARGUMENTS, "--steps", 12, "--output", folder])


def test_a_slow_rank_is_named(rank_pool, tmp_path):
    rank_pool.run(2, train_with_a_slow_rank, str(tmp_path / "slow"), 0.1)
    found = events(tmp_path / "slow", "slow_rank")
    assert found and all("rank 1 is slow: reading and computing take it 0." in event["reason"] for event in found)


BURST = (4, 5)


def train_with_a_burst(folder, stage, options):
    """Rank 1's loss is NaN in two steps; final weights and what the metrics say of the steps."""
    loss = Classification.loss
    num_micro_steps = 0

    def bursting(self, model, batch, *, dtype):
        nonlocal num_micro_steps
        step, num_micro_steps = num_micro_steps // 2, num_micro_steps + 1
        value = loss(self, model, batch, dtype=dtype)
        return value * math.nan if step in BURST and dist.get_rank() == 1 else value

    with patched(Classification, loss=bursting):
        weights, _, _ = trainer_runs.run_trainer(
            [*ARGUMENTS, "--steps", 12, "--output", folder, "--zero-stage", stage, *options]
        )
    return all(bool(torch.isfinite(value).all()) for value in weights.values() if value.is_floating_point())


@pytest.mark.parametrize("options", [(), ("--set", "gradient_clipping=1.0")], ids=["no-clip", "clip"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_burst_of_nan_leaves_the_weights_finite(rank_pool, tmp_path, stage, options):
    assert all(rank_pool.run(2, train_with_a_burst, str(tmp_path), stage, options))
    losses = [event["loss"] for event in events(tmp_path, "step")]
    assert [step for step, loss in enumerate(losses) if math.isnan(loss)] == list(BURST)
    assert losses[-1] < losses[0]


def train_while_saving_fails(folder, first_failure, num_failures):
    """Checkpoints every two steps in the background; some writes of rank 1 fail."""
    import deepspeed

    engine_class = deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine
    write, num_writes = engine_class.save, 0

    def failing(self, state_dict, path):
        nonlocal num_writes
        num_writes += 1
        if dist.get_rank() == 1 and first_failure <= num_writes < first_failure + num_failures:
            raise OSError(28, "No space left on device")
        return write(self, state_dict, path)

    with patched(engine_class, save=failing):
        weights, _, _ = trainer_runs.run_trainer(
            [*ARGUMENTS, "--steps", 12, "--output", folder, "--set", "largebatch.save_in_background=true",
             "--set", f"largebatch.save_every_epochs={2 * 96 / 1437}", "--set", "largebatch.keep_last=2"]
        )  # fmt: skip
    return weights


def test_a_background_checkpoint_that_fails_is_told_and_training_goes_on(rank_pool, tmp_path):
    whole = rank_pool.run(2, train_while_saving_fails, str(tmp_path / "whole"), 1, 0)
    failed = rank_pool.run(2, train_while_saving_fails, str(tmp_path / "failed"), 2, 1)
    assert not events(tmp_path / "whole", "checkpoint_failed")
    (told,) = events(tmp_path / "failed", "checkpoint_failed")
    assert told["step"] == 4 and "rank 1: OSError: [Errno 28] No space left on device" in told["reason"]
    for folder in ("whole", "failed"):
        kept = step_folders.steps_in(str(tmp_path / folder / "checkpoints"))
        assert kept == [12, 10] and step_folders.pointed_to(str(tmp_path / folder / "checkpoints")) == 12
    for a, b in zip(whole, failed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def train_and_keep_the_best(folder):
    trainer_runs.run_trainer(
        [*ARGUMENTS, "--steps", 45, "--output", folder, "--set", "largebatch.keep_best=test_loss",
         "--set", "largebatch.keep_last=1", "--set", f"largebatch.evaluate_every_epochs={5 * 96 / 1437}"]
    )  # fmt: skip


def test_the_best_evaluation_is_kept(rank_pool, tmp_path):
    rank_pool.run(2, train_and_keep_the_best, str(tmp_path))
    losses = {event["step"]: event["test_loss"] for event in events(tmp_path, "evaluation")}
    best = min(losses, key=losses.get)
    checkpoints = str(tmp_path / "checkpoints")
    assert step_folders.pointed_to(checkpoints, "best") == best
    assert set(step_folders.steps_in(checkpoints)) == {best, 45}
    assert step_folders.read_manifest(os.path.join(checkpoints, f"step{best}"))["metrics"]["test_loss"] == losses[best]
