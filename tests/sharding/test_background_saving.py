"""Checkpoints written beside training: the same contents, the same promises, on all ranks."""

import contextlib
import errno
import os
import pathlib
import resource
import threading

import pytest
import torch
import torch.distributed as dist

from largebatch.launch.trainer.saving import atomic, resuming, step_folders
from largebatch.launch.trainer.saving.background import BackgroundSaving
from largebatch.launch.trainer.saving.retention import Retention
from support import engine_runs

LAYOUTS = {
    "stage0-fp32": dict(stage=0, dtype="fp32"),
    "stage0-bf16": dict(stage=0, dtype="bf16"),
    "stage1-bf16-fp32acc": dict(stage=1, dtype="bf16", grad_accum="fp32"),
    "stage2-fp16-offload": dict(stage=2, dtype="fp16", zero={"offload_optimizer": {"device": "cpu"}}),
    "stage3-fp32": dict(stage=3, dtype="fp32", zero={"sub_group_size": 700}),
    "stage3-bf16": dict(stage=3, dtype="bf16"),
}


def tensors_in(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: v for key, inner in items for k, v in tensors_in(inner, f"{name}/{key}").items()}


def bits_of(tensor):
    """Padding of partitions is memory as it was found, NaN included."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def contents(checkpoint):
    """{file and place: tensor} of all files of a checkpoint."""
    loaded = {p.name: torch.load(p, weights_only=False) for p in sorted(pathlib.Path(checkpoint).glob("*.pt"))}
    return tensors_in(loaded)


def save_both_ways(algorithm, layout, folder):
    """Saves in the foreground and in the background, twice each, training going on meanwhile; whether all is the same."""
    found = []
    with engine_runs.engine_for(engine_runs.ds_config(algorithm, **layout), num_groups=2, num_steps=6) as engine:
        background = BackgroundSaving(engine, rank=dist.get_rank())
        for step in (1, 2):
            engine_runs.take_step(engine, step)
            atomic.save(engine, f"{folder}/foreground", step, rank=dist.get_rank())
            background.start(f"{folder}/background", step)
            engine_runs.take_step(engine, step + 2)
            background.finish()
            dist.barrier()
            one, other = (contents(f"{folder}/{way}/step{step}") for way in ("foreground", "background"))
            same = all(one[k].dtype == other[k].dtype and torch.equal(bits_of(one[k]), bits_of(other[k])) for k in one)
            found.append(one.keys() == other.keys() and len(one) > 0 and same)
            dist.barrier()
        background.close()
        manifests = [step_folders.read_manifest(f"{folder}/{way}/step2") for way in ("foreground", "background")]
    return found, [sorted(manifest["files"]) for manifest in manifests], resuming.newest_whole(f"{folder}/background")


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_as_in_the_foreground(rank_pool, tmp_path, layout, algorithm):
    for same, (one, other), newest in rank_pool.run(2, save_both_ways, algorithm, LAYOUTS[layout], str(tmp_path)):
        assert same == [True, True] and one == other and newest == (2, [])


def train_while_the_disk_waits(folder):
    """Whether steps are taken, and what is there, before and after the disk lets go."""
    with engine_runs.engine_for(engine_runs.ds_config("LAMB", 2), num_steps=6) as engine:
        writer, lets_go = engine.checkpoint_engine, threading.Event()
        write = writer.save

        def wait_and_write(*args, **kwargs):
            lets_go.wait()
            return write(*args, **kwargs)

        engine_runs.take_step(engine, 0)
        writer.save = wait_and_write
        background = BackgroundSaving(engine, rank=dist.get_rank())
        background.start(folder, 1, retention=Retention(last=1))
        before = engine_runs.master_pieces(engine)
        engine_runs.take_step(engine, 1)
        has_moved = any(not a[2].equal(b[2]) for a, b in zip(before, engine_runs.master_pieces(engine), strict=True))
        during = step_folders.steps_in(folder), background.is_done
        dist.barrier()
        lets_go.set()
        background.finish()
        background.start(folder, 2, retention=Retention(last=1))
        background.finish()
        return has_moved, during, step_folders.steps_in(folder), step_folders.pointed_to(folder)


def test_training_goes_on_meanwhile(rank_pool, tmp_path):
    for has_moved, during, after, latest in rank_pool.run(2, train_while_the_disk_waits, str(tmp_path)):
        assert has_moved and during == ([], False)
        assert after == [2] and latest == 2, "and older ones are removed once it is complete"


@contextlib.contextmanager
def full_disk(is_full, num_bytes=4096):
    """Inside, no file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_with_a_full_disk(folder, full_rank, in_background):
    """The error on this rank, what is left, and that the next checkpoint is whole."""
    rank = dist.get_rank()
    with engine_runs.engine_for(engine_runs.ds_config("LARS", 1), num_steps=6) as engine:
        engine_runs.take_step(engine, 0)
        atomic.save(engine, folder, 1, rank=rank)
        background = BackgroundSaving(engine, rank=rank)
        with full_disk(rank == full_rank), pytest.raises(atomic.CheckpointNotWrittenError) as error:
            if in_background:
                background.start(folder, 2)
                background.finish()
            else:
                atomic.save(engine, folder, 2, rank=rank)
        dist.barrier()
        left = sorted(name for name in os.listdir(folder) if not name.endswith(".py"))
        dist.barrier()
        engine_runs.take_step(engine, 1)
        background.start(folder, 3)
        background.finish()
        return str(error.value), left, resuming.newest_whole(folder)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_is_told_on_all_ranks(rank_pool, tmp_path, full_rank, in_background):
    told = rank_pool.run(2, save_with_a_full_disk, str(tmp_path), full_rank, in_background)
    assert len({message for message, _, _ in told}) == 1
    for message, left, newest in told:
        assert f"the checkpoint of step 2 could not be written: rank {full_rank}: " in message
        assert left == ["latest", "step1"] and newest == (3, [])


def save_where_removing_fails(folder):
    with engine_runs.engine_for(engine_runs.ds_config("LARS", 1), num_steps=6) as engine:
        engine_runs.take_step(engine, 0)
        atomic.save(engine, folder, 1, rank=dist.get_rank())

        def denied(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)

        remove, step_folders.remove = step_folders.remove, denied
        try:
            with pytest.raises(atomic.CheckpointNotRemovedError) as error:
                atomic.save(engine, folder, 2, rank=dist.get_rank(), retention=Retention(last=1))
        finally:
            step_folders.remove = remove
        return str(error.value), resuming.newest_whole(folder)


def test_an_old_one_that_cannot_be_removed(rank_pool, tmp_path):
    for message, newest in rank_pool.run(2, save_where_removing_fails, str(tmp_path)):
        assert (
            "step 2 is complete, but one that need not be kept could not be removed: rank 0: PermissionError" in message
        )
        assert newest == (2, [])
