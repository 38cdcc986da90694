"""Samples a second of the trainer beside a bare PyTorch loop: same model, data, optimizer, batch and accumulation.

    python benchmarks/trainer.py --model lenet --data mnist --data-dir DIR --micro-batch 256 --accumulation-steps 4
    python benchmarks/trainer.py --model resnet50 --data synthetic --micro-batch 8

Both run in one process on one device, one rank, in turns: a round is so many optimizer steps of each, and the medians over
the rounds are compared. The trainer's part is its own loop with its reports, metrics file and TensorBoard, on a DeepSpeed
engine; the other one keeps the images and their order on the device, normalises them, and calls torch.optim. Neither waits for
a GPU on the way (tests/unit/test_no_waits.py). The goal is a ratio of 0.97.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import interleaved

from largebatch.launch.data.data_set import Images
from largebatch.launch.recipe.flags import parse_arguments
from largebatch.launch.supervise.launcher import free_port
from largebatch.launch.trainer import main as train
from largebatch.launch.trainer.loop import TrainingLoop
from largebatch.launch.trainer.step_reports import Speed


def recipe(arguments: argparse.Namespace) -> dict:
    """SGD with momentum in fp32, ZeRO stage 0."""
    steps = (arguments.rounds + arguments.warm_up) * arguments.steps + 1
    section = {
        "model": arguments.model,
        "data": arguments.data,
        "steps": steps,
        "evaluate_every_epochs": 10**6,
    }
    if arguments.data == "synthetic":
        side = arguments.image_size
        section["data_options"] = {"image_shape": [3, side, side], "num_test_samples": 1}
    return {
        "largebatch": section,
        "train_batch_size": arguments.micro_batch * arguments.accumulation_steps,
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-4, "momentum": 0.9}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
    }


@contextlib.contextmanager
def training_loop(arguments: argparse.Namespace, folder: str) -> Iterator[TrainingLoop]:
    """The trainer, ready for its first step, as launch/train.py builds it."""
    path = os.path.join(folder, "recipe.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(recipe(arguments), file)
    options = ["--deepspeed_config", path, "--output", os.path.join(folder, "run")]
    run = train.prepare(parse_arguments(options + (["--data", arguments.data_dir] if arguments.data_dir else [])))
    train.write_configs(run.folder, run.phases, run.rank)
    loop, _ = train.open_phase(run, run.phases[0], None)
    loop.reporter.start_bar()
    yield loop
    loop.reporter.close()
    train.leave(0)


def trainer_steps(loop: TrainingLoop, num_steps: int) -> Callable[[], None]:
    """A function that takes so many steps more, their reports included."""
    loop.speed = Speed()
    batches, taken = loop._batches(0), iter(range(10**9))

    def call() -> None:
        for _ in range(num_steps):
            loop._train_one_step(next(taken), batches)

    return call


def bare_steps(loop: TrainingLoop, num_steps: int, arguments: argparse.Namespace) -> Callable[[], None]:
    """The same as a hand-written loop."""
    model = loop.task.build_model().to(loop.device)
    data = loop.task.loader.data
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    source = data.train.to(loop.device)
    micro_batch, accumulation_steps = arguments.micro_batch, arguments.accumulation_steps
    mean, std = (torch.tensor(v, device=loop.device).view(-1, 1, 1) for v in (data.mean, data.std))
    order = torch.randperm(len(source))
    if isinstance(source, Images):
        order = order.to(loop.device)
    position = 0

    def next_batch():
        nonlocal position
        if position + micro_batch > len(order):
            position = 0
        chosen = order[position : position + micro_batch]
        position += micro_batch
        return source.batch(chosen)

    def call() -> None:
        model.train()
        for _ in range(num_steps):
            for _ in range(accumulation_steps):
                pixels, labels = next_batch()
                inputs = ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(model(inputs), labels) / accumulation_steps
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--data", default="synthetic", choices=("digits", "mnist", "cifar10", "synthetic"))
    parser.add_argument("--data-dir", help="folder of the data set")
    parser.add_argument("--image-size", type=int, default=224, help="of synthetic images")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--accumulation-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    arguments = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with tempfile.TemporaryDirectory() as folder, training_loop(arguments, folder) as loop:
        contestants = {
            "trainer": trainer_steps(loop, arguments.steps),
            "bare": bare_steps(loop, arguments.steps, arguments),
        }
        timings = interleaved(
            contestants, num_rounds=arguments.rounds, num_warm_up=arguments.warm_up, device=loop.device.type
        )
        num_samples = arguments.steps * loop.resolved.global_batch
    speeds = {name: num_samples / timing.median for name, timing in timings.items()}
    print(
        f"\n{arguments.model} on {arguments.data}, micro-batch {arguments.micro_batch} x {arguments.accumulation_steps}:"
    )
    for name, timing in timings.items():
        low, high = (num_samples / timing.percentile(share) for share in (0.8, 0.2))
        print(f"{name}: {speeds[name]:.1f} images/s (p20 {low:.1f}, p80 {high:.1f})")
    print(f"trainer / bare: {speeds['trainer'] / speeds['bare']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
