"""The trainer through the real deepspeed launcher with two CPU ranks."""

import math
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from support import launching

pytestmark = pytest.mark.launcher
RECIPE = "ds_configs/lenet_digits_lars_480.json"
MLP = ("--deepspeed_config", RECIPE, "--set", "largebatch.model=mlp")


def largest_error(a, b):
    assert a.keys() == b.keys()
    return max(((a[k].double() - b[k].double()).abs().max() / b[k].abs().max().double()).item() for k in a)


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory):
    """Eight steps of 480 images as 2 ranks x 12 micro-batches of 20, ZeRO 1."""
    folder = tmp_path_factory.mktemp("accumulated")
    out = launching.train(*MLP, "--steps", 8, "--output", folder)
    return folder, out


def test_one_rank_needs_no_launcher(tmp_path):
    command = [sys.executable, "launch/train.py", *MLP, "--steps", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=launching.ROOT, env=launching.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started without a launcher: one rank" in done.stdout
    assert len(launching.events(tmp_path, "step")) == 1


def test_accumulation_equals_one_large_batch(accumulated, tmp_path):
    """N micro-batches of n against one of N n on each rank, after eight steps."""
    launching.train(*MLP, "--steps", 8, "--output", tmp_path, "--set", "train_micro_batch_size_per_gpu=240")
    assert largest_error(launching.final_weights(accumulated[0]), launching.final_weights(tmp_path)) < 1e-6


def test_one_rank_and_stage_0_give_the_same(accumulated, tmp_path):
    launching.train(*MLP, "--steps", 8, "--output", tmp_path, "--zero-stage", 0, num_ranks=1)
    assert largest_error(launching.final_weights(accumulated[0]), launching.final_weights(tmp_path)) < 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_stages_2_and_3_train_the_same(accumulated, tmp_path, stage):
    """A part of the exactness matrix through the launcher: losses and trust ratios of a real run."""
    launching.train(*MLP, "--steps", 8, "--output", tmp_path, "--zero-stage", stage)
    for kind in ("step", "layers", "evaluation"):
        for one, other in zip(launching.events(accumulated[0], kind), launching.events(tmp_path, kind), strict=True):
            if kind == "step":
                assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
            elif kind == "layers":
                for name, figures in one["layers"].items():
                    assert other["layers"][name]["trust_ratio"] == pytest.approx(figures["trust_ratio"], rel=1e-4)
            else:
                assert other["top1"] == one["top1"]


def test_what_a_run_leaves_behind(accumulated):
    folder, out = accumulated
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert {
        "batch": "480 = 20 x 12 accumulation steps x 2 ranks on cpu",
        "steps": "8",
        "precision": "fp32",
        "stage": "ZeRO 1",
        "kernels": "auto",
        "ds_config": f"{folder}/ds_config.json",
    }.items() <= rows.items()
    assert {"model", "data", "optimizer", "schedule"} <= rows.keys() and rows["optimizer"].endswith("clipping off")
    assert '"train_batch_size"' not in out, "the filled-in ds_config is in its file"
    assert "test accuracy: top-1 0." in out and f"checkpoint: {folder}/checkpoints/step8" in out
    (start,) = launching.events(folder, "start")
    assert start["config"]["optimizer"]["params"]["lr"] > 0 and start["world_size"] == 2
    assert [e["step"] for e in launching.events(folder, "step")] == list(range(1, 9))
    layers = launching.events(folder, "layers")[-1]["layers"]
    assert len(layers) == 8 and all(f["trust_ratio"] > 0 for f in layers.values())
    (end,) = launching.events(folder, "end")
    assert 0 <= end["top1"] <= end["top5"] <= 1
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(folder / "tensorboard"))
    assert (folder / "ds_config.json").exists()
    left = sorted(os.listdir(folder / "checkpoints"))
    assert [name for name in left if not name.startswith("zero_to_")] == ["latest", "step8"], (
        "the rest is DeepSpeed's own"
    )


def test_tensorboard_holds_the_trust_ratios(accumulated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(accumulated[0] / "tensorboard"))
    log.Reload()
    tags = set(log.Tags()["scalars"])
    assert {"Train/loss", "Train/lr", "Train/images_per_second", "Test/top1", "Test/top5"} <= tags
    assert {
        "TrustRatio/1.weight",
        "LocalLR/1.weight",
        "TrustRatio/6.bias",
        "WeightNorm/1.weight",
        "DirectionNorm/1.weight",
    } <= tags
    assert [s.step for s in log.Scalars("Train/loss")] == [480 * i for i in range(1, 9)]
    for key in ("trust_ratio", "local_lr"):
        last = log.Histograms(f"Layers/{key}_log10")[-1]
        layers = launching.events(accumulated[0], "layers")[-1]["layers"]
        logarithms = [math.log10(figures[key]) for figures in layers.values()]
        assert last.step == 480 * 8 and last.histogram_value.num == len(layers) == 8
        assert last.histogram_value.sum == pytest.approx(sum(logarithms))
        assert (last.histogram_value.min, last.histogram_value.max) == pytest.approx((min(logarithms), max(logarithms)))


def test_ctrl_c_saves_and_resume_continues_with_the_same_numbers(tmp_path):
    """LeNet has dropout, so the random state counts, too."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arguments = ("--deepspeed_config", RECIPE, "--steps", 30)
    launching.train(*arguments, "--output", whole)

    process = launching.start("launch/train.py", *arguments, "--output", parted)
    launching.wait_for_steps(parted, 4, process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    launching.wait_for_file(parted / "checkpoints" / "latest")
    process.communicate(timeout=launching.SECONDS)
    (interrupted,) = launching.events(parted, "interrupted")
    assert 4 <= interrupted["step"] < 30

    launching.train(*arguments, "--output", parted, "--resume")
    a, b = launching.final_weights(whole), launching.final_weights(parted)
    assert all(torch.equal(a[k], b[k]) for k in a)
    keep = ("step", "loss", "lr", "epoch")
    trace = lambda folder: [[e[k] for k in keep] for e in launching.events(folder, "step")]  # noqa: E731
    assert trace(whole) == trace(parted)
    assert launching.events(whole, "evaluation") == launching.events(parted, "evaluation")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--deepspeed_config", "ds_configs/nothing.json"], "--deepspeed_config is 'ds_configs/nothing.json', which does not exist"),
        (["--deepspeed_config", RECIPE, "--set", "largebatch.model=lenett"], "largebatch.model is 'lenett'"),
        (["--deepspeed_config", RECIPE, "--set", "train_batch_size=481"], "nearest: 480 or 520"),
        (["--deepspeed_config", RECIPE, "--set", "largebatch.data=mnist"], "--data is missing"),
    ],
)  # fmt: skip
def test_a_bad_request_is_one_line_on_every_rank(arguments, message):
    """Each rank by itself, as the launcher would start it: only local rank 0 speaks, all exit with 2."""
    for local_rank in ("0", "1"):
        env = launching.environment() | {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "2"}
        result = subprocess.run(
            [sys.executable, "launch/train.py", *arguments], cwd=launching.ROOT, env=env, capture_output=True, text=True
        )
        assert result.returncode == 2
        if local_rank == "0":
            assert (
                message in result.stderr
                and result.stderr.count("\n") == 1
                and result.stderr.startswith("largebatch: error: ")
            )
        else:
            assert result.stderr == ""


def test_a_bad_request_ends_the_launcher_with_an_error(accumulated):
    folder, _ = accumulated
    code, out, err = launching.finish(launching.start("launch/train.py", *MLP, "--steps", 8, "--output", folder))
    assert code != 0 and "already holds a run; continue it with --resume" in err and "Traceback" not in out + err
    code, out, err = launching.finish(
        launching.start(
            "launch/train.py", *MLP, "--steps", 8, "--set", "optimizer.params.momentun=0.5", "--output", f"{folder}-2"
        )
    )
    assert code != 0 and "did you mean 'momentum'?" in err and "Traceback" not in out + err


SCRIPT = """
import argparse, os
import deepspeed, torch
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser = deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()
torch.manual_seed(0)
model = torch.nn.Linear(7, 3)
engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
for step in range(3):
    loss = engine(torch.randn(4, 7)).square().mean()
    engine.backward(loss)
    engine.step()
line = f"BUILT {type(engine.basic_optimizer).__module__} {engine.get_lr()}\\n"
os.write(1, line.encode())  # at once: two ranks write to one pipe
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""

CONFIG = """{
  "train_batch_size": 8,
  "optimizer": {"type": "Lamb", "params": {"lr": 0.1}},
  "scheduler": {"type": "WarmupPolyLR", "params": {"total_steps": 10, "power": 1}},
  "gradient_clipping": 0.0,
  "zero_optimization": {"stage": 1}
}"""


def test_an_unmodified_script_through_the_module(tmp_path):
    """deepspeed --module largebatch script.py: the script knows nothing of us."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "ds_config.json").write_text(CONFIG)
    process = launching.start(
        "largebatch", tmp_path / "script.py", "--deepspeed_config", tmp_path / "ds_config.json",
        is_module=True,
    )  # fmt: skip
    before = set(os.listdir("/dev/shm"))
    code, out, err = launching.finish(process)
    for name in set(os.listdir("/dev/shm")) - before:  # 66 MB a rank, which DeepSpeed leaves behind
        if name.startswith("deepspeed_allreduce_buffer"):
            os.unlink(f"/dev/shm/{name}")
    assert code == 0, out + err
    assert out.count("BUILT largebatch.optim.lamb [0.0699") == 2
    assert "registered optimizers LARS, LAMB, NLAMB, NNLAMB, LANS (in place of DeepSpeed's own Lamb)" in err


def test_module_errors():
    result = subprocess.run([sys.executable, "-m", "largebatch", "nowhere.py"], capture_output=True, text=True)
    assert result.returncode == 2 and "'nowhere.py' is neither a file nor a module" in result.stderr


def test_results_table(accumulated, tmp_path):
    from largebatch.launch.study.results_table import main, read_run, table

    run = read_run(str(accumulated[0]))
    assert run is not None and run.num_steps == 8
    text = table([run, run])
    assert text.splitlines()[2].startswith("| LARS | ") and "| 480 | 8 | " in text and "± 0.0000 | 2 |" in text
    assert main([str(tmp_path)]) == 2
    assert pathlib.Path(accumulated[0]).exists()
