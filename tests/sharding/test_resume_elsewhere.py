"""The trainer's --resume on other ranks, at another stage or precision, in the middle of an epoch; folders that nodes do not share."""

import json
import os

import pytest
import torch.distributed as dist

from largebatch.launch.trainer import main as train
from support import engine_runs, trainer_runs

RECIPE = {
    "largebatch": {"model": "mlp", "data": "digits", "seed": 3, "steps": 24},
    "train_batch_size": 96,
    "train_micro_batch_size_per_gpu": "auto",
    "optimizer": {"type": "LAMB", "params": {"lr": 0.02, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupPolyLR", "params": {"total_steps": "auto", "warmup_steps": 3, "power": 1}},
    "gradient_clipping": 0.0,
    "tensorboard": {"enabled": False},
}
STOP = 17
"""Step in which a stop is asked for; it comes within two more. An epoch has 15 steps, less three samples: the second is on."""


def arguments(folder, recipe=RECIPE, stage=0, *options):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"recipe{recipe['train_batch_size']}.json"
    path.write_text(json.dumps(recipe))
    return ["--deepspeed_config", path, "--output", folder / "run", "--zero-stage", stage, *options]


def steps(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {e["step"]: (e["loss"], e["lr"]) for e in map(json.loads, lines) if e["event"] == "step"}


@pytest.fixture(scope="module")
def whole_run(rank_pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    rank_pool.run(2, trainer_runs.run_trainer, arguments(folder, RECIPE, 1))
    return steps(folder)


OFFLOAD = "zero_optimization.offload_optimizer.device=cpu"
ELSEWHERE = [
    ((2, 1), (1, 0), ()),
    ((2, 1), (3, 3), ("--set", "zero_optimization.sub_group_size=2000")),
    ((3, 3), (4, 2), ("--set", OFFLOAD)),
    ((1, 0), (2, 2), ("--set", "train_micro_batch_size_per_gpu=12")),
]


@pytest.mark.parametrize("saved, now, options", ELSEWHERE)
def test_resumed_elsewhere_as_if_never_interrupted(rank_pool, tmp_path, whole_run, saved, now, options):
    rank_pool.run(saved[0], trainer_runs.run_trainer, arguments(tmp_path, RECIPE, saved[1]), stop_after=STOP)
    assert STOP <= max(steps(tmp_path)) < 24
    rank_pool.run(now[0], trainer_runs.run_trainer, [*arguments(tmp_path, RECIPE, now[1], *options), "--resume"])
    found = steps(tmp_path)
    assert found.keys() == whole_run.keys()
    for step, (loss, lr) in whole_run.items():
        assert found[step][1] == lr
        assert found[step][0] == pytest.approx(loss, rel=2e-5), step


def test_from_fp32_to_bf16(rank_pool, tmp_path, whole_run):
    """The schedule and the data go on; the losses are those of another precision."""
    rank_pool.run(2, trainer_runs.run_trainer, arguments(tmp_path, RECIPE, 1), stop_after=STOP)
    rank_pool.run(3, trainer_runs.run_trainer, [*arguments(tmp_path, RECIPE, 2, "--precision", "bf16"), "--resume"])
    found = steps(tmp_path)
    assert all(found[step][1] == lr for step, (_, lr) in whole_run.items())
    assert all(found[step][0] == pytest.approx(loss, rel=0.03) for step, (loss, _) in whole_run.items())


def refusal(argv, on_own_nodes=False):
    with trainer_runs.launched(on_own_nodes), pytest.raises(ValueError) as error:
        run = train.prepare(train.parse_arguments([str(a) for a in argv]))
        train.open_phase(run, run.phases[-1], None)
    return str(error.value)


def test_another_batch_is_refused(rank_pool, tmp_path):
    rank_pool.run(2, trainer_runs.run_trainer, arguments(tmp_path, RECIPE, 1), stop_after=STOP)
    argv = [*arguments(tmp_path, RECIPE | {"train_batch_size": 48}, 1), "--resume"]
    for message in rank_pool.run(2, refusal, argv):
        assert "train_batch_size is 48 and was 96 in the run that is to be continued" in message


def on_own_node(function, folder, *args, **kwargs):
    """Each rank sees only its own folder."""
    return function(arguments(folder / f"node{dist.get_rank()}", *args), on_own_nodes=True, **kwargs)


def resumed_on_own_node(function, folder, *args, **kwargs):
    argv = arguments(folder / f"node{dist.get_rank()}", *args)
    return function([*argv, "--resume"], on_own_nodes=True, **kwargs)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_node_keeps_its_own(rank_pool, tmp_path, stage, whole_run):
    """Two nodes of one rank and a folder each: the trainer sees it, says so, and resumes."""
    rank_pool.run(2, on_own_node, trainer_runs.run_trainer, tmp_path, RECIPE, stage, stop_after=STOP)
    for rank in (0, 1):
        config = json.loads((tmp_path / f"node{rank}" / "run" / "ds_config.json").read_text()) if rank == 0 else None
        assert config is None or config["checkpoint"]["use_node_local_storage"] is True
        (checkpoint,) = (tmp_path / f"node{rank}" / "run" / "checkpoints").glob("step*")
        names = os.listdir(checkpoint)
        assert any("model_states" in name for name in names)
        assert not stage or [n for n in names if "optim" in n] == [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]
    if stage:  # other layouts need what no rank sees
        for message in rank_pool.run(2, resumed_on_own_node, refusal, tmp_path, RECIPE, 4 - stage if stage == 1 else 1):
            assert "are not there" in message and "copy those of the other nodes into one folder" in message
    rank_pool.run(2, resumed_on_own_node, trainer_runs.run_trainer, tmp_path, RECIPE, stage)
    found = steps(tmp_path / "node0")
    assert all(found[step][0] == pytest.approx(loss, rel=2e-5) for step, (loss, _) in whole_run.items())


def save_and_load(folder, save_options, stage):
    """A script of a user's own, on nodes with a folder each: the message of load_checkpoint, or None."""
    place = os.path.join(folder, f"node{dist.get_rank()}")
    config = engine_runs.ds_config("LAMB", stage, extra=save_options)
    with trainer_runs.launched(on_own_nodes=True):
        with engine_runs.engine_for(config, num_steps=4) as engine:
            engine_runs.take_step(engine, 0)
            os.makedirs(os.path.join(place, "first"), exist_ok=True)
            engine.save_checkpoint(place, tag="first")
        with engine_runs.engine_for(config, num_steps=4) as engine:
            try:
                engine.load_checkpoint(place, tag="first")
            except ValueError as error:
                return str(error)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_script_is_told_what_to_set(rank_pool, tmp_path, stage):
    told = rank_pool.run(2, save_and_load, str(tmp_path), {}, stage)
    for message in told:
        assert "has no model states for ranks 1" in message and '"use_node_local_storage": true' in message
    option = {"checkpoint": {"use_node_local_storage": True}}
    assert rank_pool.run(2, save_and_load, str(tmp_path / "local"), option, stage) == [None, None]
