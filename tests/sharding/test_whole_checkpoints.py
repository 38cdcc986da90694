"""Saving and resuming on several ranks when files are damaged or cannot be written."""

import errno
import os
import pathlib

import pytest
import torch.distributed as dist

from largebatch.launch.trainer.saving import atomic, resuming, step_folders
from support import engine_runs


def checkpoints_with_faults(folder, damage, world_stage=2):
    """Trains two steps, saves after each, damages the second, and resumes: (step, what was said, weights restored?)."""
    config = engine_runs.ds_config("LAMB", world_stage)
    with engine_runs.engine_for(config, num_steps=6) as engine:
        pieces = {}
        for step in (1, 2):
            engine_runs.take_step(engine, step)
            atomic.save(engine, folder, step, rank=dist.get_rank())
            pieces[step] = engine_runs.master_pieces(engine)
    dist.barrier()
    if dist.get_rank() == 0:
        damage(pathlib.Path(folder) / "step2")
    dist.barrier()
    step, said = resuming.newest_whole(folder)
    with engine_runs.engine_for(config, num_steps=6) as engine:
        resuming.load(engine, folder, step, rank=dist.get_rank())
        found = engine_runs.master_pieces(engine)
    is_restored = all(a[:2] == b[:2] and a[2].equal(b[2]) for a, b in zip(found, pieces[step], strict=True)) and len(
        found
    ) == len(pieces[step])
    return step, said, is_restored


def nothing(checkpoint):
    pass


def truncate(checkpoint):
    path = next(p for p in sorted(checkpoint.iterdir()) if "optim_states" in p.name)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(checkpoint):
    path = checkpoint / "mp_rank_00_model_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_a_file(checkpoint):
    next(p for p in sorted(checkpoint.iterdir()) if "optim_states" in p.name).unlink()


def remove_the_manifest(checkpoint):
    (checkpoint / step_folders.MANIFEST).unlink()


def remove_the_pointer(checkpoint):
    (checkpoint.parent / "latest").unlink()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    "damage, step, words",
    [
        (nothing, 2, None),
        (remove_the_pointer, 2, None),
        (truncate, 1, "bytes, not"),
        (flip_a_bit, 1, "mp_rank_00_model_states.pt has another checksum"),
        (remove_a_file, 1, "is missing"),
        (remove_the_manifest, 1, "manifest.json is missing"),
    ],
)
def test_the_newest_whole_one_is_taken(rank_pool, tmp_path, world_size, damage, step, words):
    for found_step, said, is_restored in rank_pool.run(world_size, checkpoints_with_faults, str(tmp_path), damage):
        assert found_step == step and is_restored
        assert len(said) == (words is not None)
        assert words is None or (said[0].startswith("step2: ") and words in said[0])


def nothing_whole(folder):
    with pytest.raises(ValueError) as error:
        resuming.newest_whole(folder)
    return str(error.value)


def test_nothing_to_resume_is_said(rank_pool, tmp_path):
    assert all("start without --resume" in message for message in rank_pool.run(2, nothing_whole, str(tmp_path)))
    (tmp_path / "step9").mkdir()
    for message in rank_pool.run(2, nothing_whole, str(tmp_path)):
        assert "step9: manifest.json is missing or unreadable" in message


def checkpoints_in(folder):
    """Names, without the scripts that DeepSpeed puts beside checkpoints."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".py"))


def save_with_a_full_disk(folder, full_rank, file_name):
    """The message on this rank, and what training and the next checkpoint come to."""
    with engine_runs.engine_for(engine_runs.ds_config("LARS", 1), num_steps=6) as engine:
        engine_runs.take_step(engine, 0)
        atomic.save(engine, folder, 1, rank=dist.get_rank())
        engine_runs.take_step(engine, 1)
        writer = engine.checkpoint_engine
        write = writer.save

        def fails(state_dict, path, *args, **kwargs):
            if file_name in os.path.basename(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(state_dict, path, *args, **kwargs)

        if dist.get_rank() == full_rank:
            writer.save = fails
        with pytest.raises(atomic.CheckpointNotWrittenError) as error:
            atomic.save(engine, folder, 2, rank=dist.get_rank())
        dist.barrier()
        left = checkpoints_in(folder)
        if dist.get_rank() == full_rank:
            writer.save = write
        engine_runs.take_step(engine, 2)
        atomic.save(engine, folder, 3, rank=dist.get_rank())
        return str(error.value), left, resuming.newest_whole(folder)


@pytest.mark.parametrize("full_rank, file_name", [(0, "model_states"), (1, "optim_states")])
def test_a_full_disk_on_one_rank(rank_pool, tmp_path, full_rank, file_name):
    for message, left, newest in rank_pool.run(2, save_with_a_full_disk, str(tmp_path), full_rank, file_name):
        assert f"rank {full_rank}: OSError" in message and "No space left on device" in message
        assert left == ["latest", "step1"]
        assert newest == (3, [])


def save_to(folder):
    with engine_runs.engine_for(engine_runs.ds_config("LARS", 1), num_steps=6) as engine:
        engine_runs.take_step(engine, 0)
        with pytest.raises(atomic.CheckpointNotWrittenError) as error:
            atomic.save(engine, folder, 1, rank=dist.get_rank())
        return str(error.value)


def test_a_folder_that_cannot_be_made(rank_pool, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for message in rank_pool.run(2, save_to, str(tmp_path / "file" / "checkpoints")):
        assert "rank 0: " in message and "rank 1: " in message and "--output" in message


def save_twice(folder):
    """Paths and times of the first checkpoint's files after saving the same step again, and after damage."""
    with engine_runs.engine_for(engine_runs.ds_config("LAMB", 1), num_steps=6) as engine:
        engine_runs.take_step(engine, 0)
        path = pathlib.Path(atomic.save(engine, folder, 1, rank=dist.get_rank()))
        first = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
        atomic.save(engine, folder, 1, rank=dist.get_rank())
        second = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
        dist.barrier()
        if dist.get_rank() == 0:
            remove_a_file(path)
        dist.barrier()
        atomic.save(engine, folder, 1, rank=dist.get_rank())
        return first == second, resuming.newest_whole(folder), checkpoints_in(folder)


def test_a_whole_checkpoint_is_kept_and_a_damaged_one_replaced(rank_pool, tmp_path):
    for is_kept, newest, left in rank_pool.run(2, save_twice, str(tmp_path)):
        assert is_kept
        assert newest == (1, [])
        assert left == ["latest", "step1"]
