"""LAMB at batch 8,192 on MNIST under every ZeRO stage: largebatch against timm's Lamb, same seed, same data.

    python benchmarks/zero_curves.py --data DIR [--output runs/zero_curves] [--plot docs/zero_curves.png]

Each curve is one run of the deepspeed launcher (two ranks). The model is the trainer's small MLP in fp32, so that
differences come from the optimizer alone. Prints the largest distance of each loss curve from the one of stage 0.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

from largebatch.launch.supervise.launcher import free_port

ROOT = pathlib.Path(__file__).resolve().parents[1]
GLOBAL_BATCH, MICRO_BATCH, NUM_STEPS, LEARNING_RATE, WEIGHT_DECAY, SEED = 8192, 1024, 100, 0.02, 0.01, 1
LAYOUTS = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "sub_group_size": 20000},
    "stage 2, offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage 3, offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def work(arguments: argparse.Namespace) -> None:
    """One run, inside a rank: writes the loss of every step."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from largebatch import schedule
    from largebatch.engine.initialization import init_distributed, prepare_deepspeed
    from largebatch.launch.data.image_loader import ImageLoader
    from largebatch.launch.data.sources import load_data
    from largebatch.models.catalogue import build_model

    prepare_deepspeed()
    init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data = load_data("mnist", arguments.data)
    torch.manual_seed(SEED)
    model = build_model("mlp", image_shape=data.image_shape, num_classes=data.num_classes)
    accumulation_steps = GLOBAL_BATCH // (MICRO_BATCH * world_size)
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": 0.0,
        "zero_optimization": LAYOUTS[arguments.layout],
        "steps_per_print": 10**9,
    }
    optimizer = None
    if arguments.peer == "timm":
        from timm.optim import Lamb

        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        # the paper's algorithm: no clip of its own, every layer adapted
        optimizer = Lamb(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=None, always_adapt=True
        )
    else:
        config["optimizer"] = {"type": "LAMB", "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, optimizer=optimizer
    )
    batches = ImageLoader(data).micro_batches(
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=rank,
        world_size=world_size,
        device=engine.device,
    )
    losses = []
    for step in range(NUM_STEPS):
        factor = schedule.warmup_factor(step, num_warmup_steps=10) * schedule.polynomial_factor(
            step, num_steps=NUM_STEPS, num_warmup_steps=10, power=1
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for _ in range(accumulation_steps):
            pixels, labels, _ = next(batches)
            loss = torch.nn.functional.cross_entropy(engine(data.inputs(pixels, torch.float32)), labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / (accumulation_steps * world_size))
    if rank == 0:
        with open(arguments.result, "w", encoding="utf-8") as file:
            json.dump(losses, file)
    dist.barrier()
    dist.destroy_process_group()


def drive(arguments: argparse.Namespace) -> int:
    """Starts all runs that have no result yet, then compares and plots."""
    os.makedirs(arguments.output, exist_ok=True)
    curves: dict[str, dict[str, list[float]]] = {"largebatch": {}, "timm": {}}
    for peer, of_layout in curves.items():
        for layout in LAYOUTS:
            result = os.path.join(
                os.path.abspath(arguments.output), f"{peer}-{layout.replace(', ', '-').replace(' ', '')}.json"
            )
            if not os.path.exists(result):
                command = ["deepspeed", "--num_accelerators", "2", "--log_level", "error"]
                command += ["--master_port", str(free_port()), __file__, "--work"]
                command += [
                    "--data",
                    os.path.abspath(arguments.data),
                    "--peer",
                    peer,
                    "--layout",
                    layout,
                    "--result",
                    result,
                ]
                subprocess.run(command, cwd=ROOT, check=False)
            if os.path.exists(result):
                with open(result, encoding="utf-8") as file:
                    of_layout[layout] = json.load(file)
    reference = curves["largebatch"]["stage 0"]
    print("| layout | largebatch: largest distance from stage 0 | final loss | timm Lamb: the same | final loss |")
    print("|---|---|---|---|---|")
    for layout in LAYOUTS:
        cells = []
        for peer in curves:
            losses = curves[peer].get(layout)
            if losses is None:
                cells += ["did not finish", ""]
                continue
            base = reference if peer == "largebatch" else curves["timm"]["stage 0"]
            distance = max(abs(a - b) if a == a else float("inf") for a, b in zip(losses, base, strict=True))
            cells += [f"{distance:.1e}", f"{losses[-1]:.4f}"]
        print(f"| {layout} | {' | '.join(cells)} |")
    if arguments.plot:
        plot(curves, arguments.plot)
    return 0


def plot(curves: dict[str, dict[str, list[float]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    titles = {"largebatch": "largebatch LAMB", "timm": "timm Lamb"}
    styles = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 3))]
    for axis, (peer, of_layout) in zip(axes, curves.items(), strict=True):
        for i, (layout, losses) in enumerate(of_layout.items()):
            axis.plot(range(1, len(losses) + 1), losses, label=layout, linestyle=styles[i], linewidth=2.4 - 0.3 * i)
        axis.set(title=titles[peer], xlabel="step (8,192 images each)", ylim=(0.05, 10), yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    axes[0].set_ylabel("training loss")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds MNIST/")
    parser.add_argument("--output", default="runs/zero_curves")
    parser.add_argument("--plot", help="PNG to write (needs matplotlib)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return 0
    return drive(arguments)


if __name__ == "__main__":
    sys.exit(main())
