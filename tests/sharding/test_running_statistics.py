"""Running statistics of batch normalisation on several ranks: averaged for evaluations and checkpoints, each rank's own in training."""

import os

import torch
import torch.distributed as dist
from torch import nn

from largebatch.launch.trainer.running_statistics import averaged_over_ranks, load_own, own_state, statistics_of
from support import trainer_runs


def model_of_rank():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    model[1].running_mean += torch.tensor([1.0, 10.0]) * dist.get_rank()
    model[1].running_var += dist.get_rank()
    return model


def values(model):
    return [buffer.tolist() for buffer in statistics_of(model)]


def average_and_go_on():
    model = model_of_rank()
    own = values(model)
    with averaged_over_ranks(model):
        inside = values(model)
    return own, inside, values(model)


def test_inside_is_the_mean_and_afterwards_the_own(rank_pool):
    for rank, (own, inside, after) in enumerate(rank_pool.run(3, average_and_go_on)):
        assert own == after == [[1.0 * rank, 10.0 * rank], [1.0 + rank] * 2]
        assert inside == [[1.0, 10.0], [2.0, 2.0]]


def save_and_load(folder):
    model = model_of_rank()
    name, own = own_state(model, dist.get_rank())
    torch.save(own, os.path.join(folder, name))
    dist.barrier()
    fresh = model_of_rank()
    for buffer in statistics_of(fresh):
        buffer.fill_(7.0)
    load_own(fresh, folder, dist.get_rank())
    return values(fresh)


def load_only(folder):
    model = model_of_rank()
    load_own(model, folder, dist.get_rank())
    return values(model)


def test_a_checkpoint_keeps_each_ranks_own_for_as_many_ranks(rank_pool, tmp_path):
    assert rank_pool.run(2, save_and_load, str(tmp_path)) == [[[0.0, 0.0], [1.0, 1.0]], [[1.0, 10.0], [2.0, 2.0]]]
    assert rank_pool.run(1, load_only, str(tmp_path)) == [[[0.0, 0.0], [1.0, 1.0]]], "as the checkpoint left it"


ARGUMENTS = (
    "--deepspeed_config", "lenet_digits_lars_480", "--steps", 4, "--set", "largebatch.model=davidnet",
    "--set", 'largebatch.model_options={"width": 2}', "--set", "train_batch_size=48",
    "--set", "train_micro_batch_size_per_gpu=12", "--set", "tensorboard.enabled=false", "--set", "optimizer.params.lr=0.1",
    "--set", "largebatch.lr_scaling=null", "--output",
)  # fmt: skip


def test_a_resumed_run_goes_on_bit_by_bit(rank_pool, tmp_path):
    """Weights and each rank's own running statistics, which differ."""
    whole = rank_pool.run(2, trainer_runs.run_trainer, [*ARGUMENTS, tmp_path / "whole"])
    rank_pool.run(2, trainer_runs.run_trainer, [*ARGUMENTS, tmp_path / "parted"], 1)
    parted = rank_pool.run(2, trainer_runs.run_trainer, [*ARGUMENTS, tmp_path / "parted", "--resume"])
    for (weights, *_), (others, *_) in zip(whole, parted, strict=True):
        assert all(torch.equal(weights[name], others[name]) for name in weights)
    (first, *_), (second, *_) = whole
    names = [name for name in first if name.endswith("running_mean")]
    assert names and not all(torch.equal(first[name], second[name]) for name in names)
