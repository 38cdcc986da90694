"""The MNIST table of the README: every lenet_mnist recipe with several seeds through the deepspeed launcher.

    python benchmarks/mnist.py --data DIR [--seeds 1,2,3] [--batches 1k,8k,60k] [--output runs/mnist]

Finished runs are kept and skipped, interrupted ones resumed, so the command may be repeated until the table is whole.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys

import torch

from largebatch.launch.ports import free_port
from largebatch.launch.results_table import read_run, table

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIMIZERS = ("sgd", "lars", "lamb")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds MNIST/")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--batches", default="1k,8k,60k")
    parser.add_argument("--output", default="runs/mnist")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    arguments = parser.parse_args()
    names = [f"{optimizer}_{batch}" for batch in arguments.batches.split(",") for optimizer in OPTIMIZERS]
    folders = []
    for seed in arguments.seeds.split(","):
        for name in names:
            folder = os.path.join(arguments.output, f"{name}_seed{seed}")
            folders.append(folder)
            if read_run(folder) is None:
                train(name, seed, folder, arguments)
                print(table([run for run in map(read_run, folders) if run is not None]), flush=True)
    runs = [run for run in map(read_run, folders) if run is not None]
    runs.sort(key=lambda run: run.config["train_batch_size"])
    print(table(runs))
    return 0 if len(runs) == len(folders) else 1


def train(name: str, seed: str, folder: str, arguments: argparse.Namespace) -> None:
    command = ["deepspeed", "--num_accelerators", str(arguments.ranks), "--log_level", "error"]
    command += ["--master_port", str(free_port()), "launch/train.py"]
    command += ["--deepspeed_config", f"ds_configs/lenet_mnist_{name}.json", "--data", os.path.abspath(arguments.data)]
    command += ["--seed", seed, "--output", os.path.abspath(folder)]
    if os.path.exists(os.path.join(folder, "checkpoints", "latest")):
        command.append("--resume")
    print(" ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=False)


if __name__ == "__main__":
    sys.exit(main())
