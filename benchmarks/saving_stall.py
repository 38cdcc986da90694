"""How much of training a checkpoint costs: steps with one every N steps, in the background and not, against steps without.

    deepspeed --num_accelerators 2 benchmarks/saving_stall.py --model resnet50 --image_size 64 --steps 20 --rounds 5

A round is N steps without a checkpoint, N steps with one written while training waits, and N with one written in the
background, in turns, each from the request for the checkpoint until the last step is taken and the checkpoint complete. The
trainer's own loop, engine and saving; synthetic images; LAMB in fp32 under ZeRO 1. Medians over the rounds. The aim for the background is a ratio of 1.05.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import torch.distributed as dist

from largebatch.launch.recipe.flags import parse_arguments
from largebatch.launch.trainer import main as train
from largebatch.launch.trainer.loop import TrainingLoop
from largebatch.launch.trainer.saving.atomic import save
from largebatch.launch.trainer.saving.retention import Retention
from largebatch.launch.trainer.saving.storage import broadcast
from largebatch.launch.trainer.step_reports import Speed

WAYS = ("none", "foreground", "background")


def recipe(arguments: argparse.Namespace) -> dict:
    side = arguments.image_size
    return {
        "largebatch": {
            "model": arguments.model,
            "data": "synthetic",
            "data_options": {"image_shape": [3, side, side], "num_test_samples": 1},
            "steps": 10**6,
            "evaluate_every_epochs": 10**6,
            "save_in_background": True,
        },
        "train_batch_size": arguments.batch,
        "optimizer": {"type": "LAMB", "params": {"lr": 1e-4, "weight_decay": 0.01}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "tensorboard": {"enabled": False},
    }


def training_loop(arguments: argparse.Namespace, folder: str) -> TrainingLoop:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"recipe_rank{os.environ.get('RANK', 0)}.json")  # nobody waits for another's
    pathlib.Path(path).write_text(json.dumps(recipe(arguments)), encoding="utf-8")
    run = train.prepare(parse_arguments(["--deepspeed_config", path, "--output", os.path.join(folder, "run")]))
    train.write_configs(run.folder, run.phases, run.rank)
    return train.open_phase(run, run.phases[0], None)[0]


def measure(loop: TrainingLoop, arguments: argparse.Namespace, folder: str) -> dict[str, list[float]]:
    """{way: [rounds] seconds of N steps and their checkpoint}; the first round warms up and is left out."""
    loop.speed = Speed()
    batches = loop._batches(0)
    keep_one = Retention(last=1)
    num_taken = num_saved = 0

    def steps() -> None:
        nonlocal num_taken
        for _ in range(arguments.steps):
            loop._train_one_step(num_taken, batches)
            num_taken += 1
        loop._report_taken()

    def timed(way: str) -> float:
        nonlocal num_saved
        dist.barrier()
        began = time.perf_counter()
        num_saved += 1
        if way == "foreground":
            save(loop.engine, folder, num_saved, rank=loop.rank, retention=keep_one)
        elif way == "background":
            loop.saver.background.start(folder, num_saved, retention=keep_one)
        steps()
        loop.saver.background.finish()
        return time.perf_counter() - began

    rounds = [{way: timed(way) for way in WAYS} for _ in range(arguments.rounds + 1)][1:]
    return {way: [of_round[way] for of_round in rounds] for way in WAYS}


def print_table(say: Callable[[str], None], measured: dict[str, list[float]], num_steps: int) -> None:
    base = statistics.median(measured["none"])
    say("| checkpoint | seconds for the steps | ratio |\n|---|---|---|")
    for way, seconds in measured.items():
        say(f"| {way} | {statistics.median(seconds):.2f} | {statistics.median(seconds) / base:.3f} |")
    waiting = statistics.median(measured["foreground"]) - base
    say(f"{num_steps} steps to a checkpoint; written while training waits it takes {waiting:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="global batch")
    parser.add_argument("--steps", type=int, default=20, help="to a checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where checkpoints go (default: the system's temporary folder)")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    arguments = parser.parse_args()
    # all ranks have to agree on the folder before there is a process group to ask
    folder = os.path.join(arguments.folder or tempfile.gettempdir(), f"saving_stall_{os.environ.get('MASTER_PORT', 0)}")
    os.makedirs(folder, exist_ok=True)
    loop = training_loop(arguments, folder)
    measured = measure(loop, arguments, os.path.join(folder, "checkpoints"))
    size = sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*.pt"))
    broadcast(0)
    loop.reporter.say(f"checkpoint of {size / 1e6:.0f} MB, {loop.world_size} ranks on {loop.device.type}")
    print_table(loop.reporter.say, measured, arguments.steps)
    loop.reporter.close()
    if loop.rank == 0:
        shutil.rmtree(folder)
    train.leave(0)


if __name__ == "__main__":
    main()
