"""The search for the largest micro-batch: the least of what fits on the ranks, and nothing but a lack of memory is caught."""

import json

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from largebatch.engine.silent_collectives import silent_collectives
from largebatch.launch.recipe.batch_division import micro_batch_candidates
from largebatch.launch.recipe.reading import read_recipe
from largebatch.launch.recipe.section import check_section
from largebatch.launch.trainer import engines
from largebatch.launch.trainer.micro_batch import is_out_of_memory, largest_that_fits, on_all_ranks
from support import trainer_runs

RECIPE = "lenet_digits_lars_480"
CPU = torch.device("cpu")


@given(candidates=st.lists(st.integers(1, 10**6), min_size=1, unique=True).map(sorted), limit=st.integers(0, 10**6))
def test_the_search_finds_the_largest(candidates, limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    if candidates[0] > limit:
        with pytest.raises(ValueError, match=f"smallest possible micro-batch, {candidates[0]}"):
            largest_that_fits(candidates, fits, world_size=1)
    else:
        found = largest_that_fits(candidates, fits, world_size=1)
        assert found == max(c for c in candidates if c <= limit)
    assert len(tried) <= len(candidates).bit_length()


@pytest.mark.parametrize(
    "error, is_it",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_it):
    assert is_out_of_memory(error) == is_it


def agreed(limits):
    def fits(size):
        return on_all_ranks(lambda: size <= limits[dist.get_rank()], CPU)

    return largest_that_fits([1, 2, 4, 8, 16], fits, world_size=dist.get_world_size())


def test_all_ranks_agree_on_the_least(rank_pool):
    assert rank_pool.run(3, agreed, [16, 5, 8]) == [4, 4, 4]
    with pytest.raises(AssertionError) as caught:
        rank_pool.run(2, agreed, [16, 0])
    assert str(caught.value).count("out of memory with the smallest possible micro-batch, 1, on at least one of 2") == 2


def communicate_in_silence():
    mine = torch.full((3,), float(dist.get_rank()))
    gathered = torch.zeros(3 * dist.get_world_size())
    if dist.get_rank() == 1:  # alone: nobody answers
        with silent_collectives():
            dist.all_reduce(mine)
            dist.all_reduce(mine, async_op=True).wait()
            dist.all_gather_into_tensor(gathered, mine)
            dist.reduce_scatter_tensor(mine, gathered.clone())
            dist.broadcast(mine, src=0)
            assert dist.new_group([0, 1]) is dist.group.WORLD
            dist.barrier()
        assert mine.tolist() == [1.0] * 3 and not gathered.any()
    dist.all_reduce(mine)
    dist.all_gather_into_tensor(gathered, mine)
    return gathered.tolist()


def test_silent_collectives_wait_for_nobody_and_end(rank_pool):
    assert rank_pool.run(2, communicate_in_silence) == [[1.0] * 6] * 2


def with_batch_norm(ghost_batch_size, mixup=0.0, batch=480):
    recipe = {
        "largebatch": {
            "model": "lenet",
            "data": "digits",
            "epochs": 1,
            "batch_norm": {"ghost_batch_size": ghost_batch_size},
            "mixup": mixup,
        }
    }
    return recipe | {"largebatch": check_section(recipe), "train_batch_size": batch}


def test_candidates_keep_the_batch_the_ghosts_and_pairs():
    assert micro_batch_candidates(with_batch_norm("micro_batch", batch=24), 2) == [1, 2, 3, 4, 6, 12]
    assert micro_batch_candidates(with_batch_norm("micro_batch", 0.2, batch=24), 2) == [2, 4, 6, 12]
    # 4 images: of one rank, or of two with 2 each
    assert micro_batch_candidates(with_batch_norm(4, batch=48), 2) == [2, 4, 8, 12, 24]
    with pytest.raises(
        ValueError,
        match="cannot make with largebatch.batch_norm.ghost_batch_size 32; nearest that they can: 448 or 512",
    ):
        micro_batch_candidates(with_batch_norm(32, batch=500), 2)


def arguments(folder, stage, micro, precision="fp32"):
    return [
        "--deepspeed_config", RECIPE, "--steps", 2, "--zero-stage", stage, "--precision", precision, "--output", folder,
        "--set", "largebatch.model=mlp", "--set", f"train_micro_batch_size_per_gpu={json.dumps(micro)}",
        "--set", "tensorboard.enabled=false",
    ]  # fmt: skip


def train_with_little_memory(folder, stage, precision, micro):
    """Room for 20 images on rank 1: 15, 40, 20 and 24 are tried, and engines built again after 40."""
    with trainer_runs.out_of_memory_above(20, rank=1):
        return trainer_runs.run_trainer(arguments(folder, stage, micro, precision))


@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_training_after_a_search_is_training_without(rank_pool, tmp_path, stage, precision):
    """Batch, order of the data and gradients are what they are when the recipe names the micro-batch: the same bits."""
    found = rank_pool.run(2, train_with_little_memory, tmp_path / "searched", stage, precision, "auto")
    assert [micro for *_, micro in found] == [20, 20]
    named = rank_pool.run(2, trainer_runs.run_trainer, arguments(tmp_path / "named", stage, 20, precision))
    for (weights, *_), (others, *_) in zip(found, named, strict=True):
        assert weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights)
    assert read_recipe(str(tmp_path / "searched" / "ds_config.json"))["gradient_accumulation_steps"] == 12


def resume_with_little_memory(folder):
    with trainer_runs.out_of_memory_above(100, rank=1):
        trainer_runs.run_trainer(arguments(folder, 1, "auto"), stop_after=0)
    with trainer_runs.out_of_memory_above(100, rank=1), trainer_runs.patched(engines, largest_that_fits=None):
        return trainer_runs.run_trainer([*arguments(folder, 1, "auto"), "--resume"])[2]


def test_a_resumed_run_keeps_its_micro_batch(rank_pool, tmp_path):
    """Nothing is tried again: batch normalisation may depend on it."""
    assert rank_pool.run(2, resume_with_little_memory, tmp_path / "run") == [80, 80]


def train_with_a_bug(folder):
    with trainer_runs.out_of_memory_above(100, rank=1, error=RuntimeError):
        trainer_runs.run_trainer(arguments(folder, 1, "auto"))


def test_other_errors_are_not_taken_for_a_lack_of_memory(rank_pool, tmp_path):
    """And keep no other rank waiting."""
    with pytest.raises(AssertionError) as caught:
        rank_pool.run(2, train_with_a_bug, tmp_path / "run")
    of_rank_0, of_rank_1 = str(caught.value).split("rank 1 of 2:")
    assert "RuntimeError: another rank has failed while it tried a micro-batch" in of_rank_0
    assert "RuntimeError: no room for 120 images" in of_rank_1


def train_without_room(folder):
    with trainer_runs.out_of_memory_above(0, rank=1):
        trainer_runs.run_trainer(arguments(folder, 1, "auto"))


def test_no_room_at_all(rank_pool, tmp_path):
    with pytest.raises(AssertionError) as caught:
        rank_pool.run(2, train_without_room, tmp_path / "run")
    assert str(caught.value).count("ValueError: out of memory with the smallest possible micro-batch, 1") == 2
