"""What the telemetry of the layers costs a step, against the step without it; all in one process, interleaved.

    python benchmarks/layer_stats.py [--models lenet,torchvision:resnet18] [--rounds 30]

Timed apart: a whole step of one micro-batch; within it, keeping the figures on the device (on a GPU: the launches); and
reading and writing them to metrics.jsonl and TensorBoard, which the trainer does every ``layer_stats_every_steps`` (by
default at 100 steps of a run). Of each the 20th percentile: other work on the machine can only add to a time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time

import harness
import torch
from torch.nn.functional import cross_entropy

from largebatch.engine.initialization import init_distributed, prepare_deepspeed
from largebatch.launch.supervise.launcher import free_port
from largebatch.launch.trainer.reporting import Reporter
from largebatch.models.catalogue import build_model
from largebatch.optim.calls import Call

SHAPES = {"lenet": ((1, 28, 28), 10, 256), "torchvision:resnet18": ((3, 64, 64), 1000, 64)}
"""Model -> (image shape, classes, samples a step)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--optimizer", default="LAMB")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    for name, value in (
        ("RANK", 0),
        ("LOCAL_RANK", 0),
        ("WORLD_SIZE", 1),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", free_port()),
    ):
        os.environ.setdefault(name, str(value))
    prepare_deepspeed()
    init_distributed()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{harness.hardware(device)}; {harness.versions('torch', 'deepspeed')}; {arguments.optimizer}, ZeRO 1, fp32\n"
    )
    print(
        "| model | layers | step, ms | keeping, ms | reading and writing, ms | both, of a step |\n" + "|---" * 6 + "|"
    )
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(measure(model, arguments, device, folder), flush=True)
    torch.distributed.destroy_process_group()


def measure(model: str, arguments, device: str, folder: str) -> str:
    """A row of the table."""
    image_shape, num_classes, batch = SHAPES[model]
    torch.manual_seed(0)
    network = build_model(model, image_shape=image_shape, num_classes=num_classes)
    config = {
        "train_batch_size": batch,
        "optimizer": {"type": arguments.optimizer, "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,
        "tensorboard": {"enabled": True, "output_path": folder, "job_name": "tensorboard"},
        "steps_per_print": 10**9,
    }
    with contextlib.redirect_stdout(None):
        import deepspeed

        engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)
    images = torch.rand(batch, *image_shape, device=engine.device)
    labels = torch.randint(num_classes, (batch,), device=engine.device)
    reporter = Reporter(os.path.join(folder, "metrics.jsonl"), engine.monitor, rank=0, num_samples=1, samples_done=0)
    optimizer, stats_of = engine.basic_optimizer, Call.stats_of
    steps = 0

    def step() -> None:
        engine.backward(cross_entropy(engine(images), labels))
        engine.step()

    def write() -> None:
        nonlocal steps
        steps += 1
        layers = optimizer.layer_stats()
        reporter.event("layers", step=steps, layers=layers)
        scalars = {}
        for name, figures in layers.items():
            scalars[f"TrustRatio/{name}"] = figures["trust_ratio"]
            scalars[f"LocalLR/{name}"] = figures["local_lr"]
            scalars[f"WeightNorm/{name}"] = figures["weight_norm"]
            scalars[f"DirectionNorm/{name}"] = figures["direction_norm"]
        reporter.scalars(scalars, steps)
        over_layers = {f"Layers/{key}": [f[key] for f in layers.values()] for key in ("trust_ratio", "local_lr")}
        reporter.histograms(over_layers, steps)

    def timed_stats_of(*given):
        start = time.perf_counter()
        try:
            return stats_of(*given)
        finally:
            keeping[-1] += time.perf_counter() - start

    def step_and_note() -> None:
        keeping.append(0.0)
        step()

    Call.stats_of, keeping = timed_stats_of, []
    timings = harness.interleaved({"step": step_and_note, "write": write}, num_rounds=arguments.rounds, device=device)
    Call.stats_of = stats_of
    whole, written = (1000 * timings[name].percentile(0.2) for name in ("step", "write"))
    kept = 1000 * harness.Timing(keeping).percentile(0.2)
    reporter.close()
    return f"| {model} | {len(optimizer.layer_stats())} | {whole:.2f} | {kept:.3f} | {written:.3f} | {100 * (kept + written) / whole:.2f}% |"


if __name__ == "__main__":
    main()
