"""What a step costs beside other optimizers: ratios in one interleaved run, after the kernels' tests have passed.

    python benchmarks/kernels.py [--device cuda] [--shapes resnet50,bert-large] [--rounds 25] [--report FILE.md]

Writes a dated report (and a plot beside it, where matplotlib is installed) under benchmarks/reports/.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch
from harness import Timing, copy_bandwidth, interleaved, preamble
from shapes import SHAPES, Shape, numel

import largebatch
from largebatch.kernels import dispatch
from largebatch.kernels.interface import Segments
from largebatch.layer_map.partition import Partition
from largebatch.layer_map.segment import slice_of_concatenation

ROOT = pathlib.Path(__file__).resolve().parents[1]

# bytes an element that a step must move: weight, gradient, state read; weight, state written. In fp32.
ADAM_BYTES, SGD_BYTES = 28, 20
GPU_LAMB_BYTES = 40
"""Two passes without a cache between them: 24 for the moments and the sums, 16 for the weights."""


def parameters(shapes: list[Shape], device: str) -> list[torch.nn.Parameter]:
    """With gradients. Filled in place, as networks are: temporaries would leave holes between the tensors."""
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(s, device=device, generator=generator).mul_(0.05)) for s in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, device=device, generator=generator).mul_(1e-3)
    return made


def flattened(optimizer_class: type, shapes: list[Shape], device: str, **options):
    """The optimizer as an engine leaves it: one flat tensor in the place of all parameters."""
    layers = parameters(shapes, device)
    optimizer = optimizer_class(layers, **options)
    flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in layers]))
    flat.grad = torch.cat([p.grad.reshape(-1) for p in layers])
    numels = [p.numel() for p in layers]
    offsets = list(itertools.accumulate(numels[:-1], initial=0))
    layer_map = slice_of_concatenation(numels, offsets, flat.numel(), 0)
    optimizer.await_layout()
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.attach({flat: Partition(layer_map, tuple(layers), None)})
    return optimizer


def fused_adamw(p: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01, fused=True)


def peers(device: str, without: dict[str, str] | None = None) -> tuple[dict[str, Callable], list[str]]:
    """name -> optimizer of parameters; and what could not be had, with the reason.

    Args:
        without: name -> reason for peers that are not to be tried, because that would compile for minutes.
    """
    absent = [f"{name}: {reason}" for name, reason in (without or {}).items()]
    found: dict[str, Callable] = {
        "torch AdamW (fused)": fused_adamw,
        "torch SGD (fused)": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True),
        "torch AdamW (foreach)": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01, foreach=True),
        "torch SGD (foreach)": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=1e-4, foreach=True),
    }

    def add(name: str, make: Callable[[], Callable]) -> None:
        if name in (without or {}):
            return
        try:
            constructor = make()
            probe = parameters([(64,)], device)
            constructor(probe).step()
            found[name] = constructor
        except Exception as error:  # a peer may fail in any way of its own
            absent.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])

    def timm_lamb():
        from timm.optim import Lamb

        return lambda p: Lamb(p, lr=1e-4, weight_decay=0.01)

    def timm_lars():
        from timm.optim import Lars

        return lambda p: Lars(p, lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def torch_optimizer_lamb():
        from torch_optimizer import Lamb

        return lambda p: Lamb(p, lr=1e-4, weight_decay=0.01)

    def pytorch_optimizer_lamb():
        from pytorch_optimizer import Lamb

        return lambda p: Lamb(p, lr=1e-4, weight_decay=0.01)

    def pytorch_optimizer_lars():
        from pytorch_optimizer import LARS

        return lambda p: LARS(p, lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def deepspeed_cpu_adam():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return lambda p: DeepSpeedCPUAdam(p, lr=1e-4, weight_decay=0.01)

    def apex_lamb():
        from apex.optimizers import FusedLAMB

        return lambda p: FusedLAMB(p, lr=1e-4, weight_decay=0.01, max_grad_norm=1e9)

    def deepspeed_lamb():
        from deepspeed.ops.lamb import FusedLamb

        return lambda p: FusedLamb(p, lr=1e-4, weight_decay=0.01)

    def deepspeed_adam():
        from deepspeed.ops.adam import FusedAdam

        return lambda p: FusedAdam(p, lr=1e-4, weight_decay=0.01)

    add("timm Lamb", timm_lamb)
    add("timm Lars", timm_lars)
    add("torch_optimizer Lamb", torch_optimizer_lamb)
    add("pytorch_optimizer Lamb", pytorch_optimizer_lamb)
    add("pytorch_optimizer LARS", pytorch_optimizer_lars)
    if device == "cpu":
        add("DeepSpeedCPUAdam", deepspeed_cpu_adam)
    else:
        add("apex FusedLAMB", apex_lamb)
        add("DeepSpeed FusedLamb", deepspeed_lamb)
        add("DeepSpeed FusedAdam", deepspeed_adam)
    return found, absent


def ours(device: str) -> dict[str, Callable]:
    lamb = {"lr": 1e-4, "weight_decay": 0.01}
    lars = {"lr": 1e-4, "weight_decay": 1e-4}
    return {
        "LAMB": lambda p: largebatch.LAMB(p, **lamb),
        "LARS": lambda p: largebatch.LARS(p, **lars),
        "LAMB, overwrite_grads": lambda p: largebatch.LAMB(p, overwrite_grads=True, **lamb),
        "LAMB, bf16 state": lambda p: largebatch.LAMB(p, state_dtype="bf16", **lamb),
    }


FLAT = {"LAMB, flat partition": (largebatch.LAMB, 0.01), "LARS, flat partition": (largebatch.LARS, 1e-4)}
"""name -> optimizer and weight decay of ours under an engine, see :func:`flattened`."""


def flat_partitions(shapes: list[Shape], device: str) -> dict[str, Callable]:
    """name -> a step, of :data:`FLAT`."""
    return {
        name: flattened(optimizer_class, shapes, device, lr=1e-4, weight_decay=decay).step
        for name, (optimizer_class, decay) in FLAT.items()
    }


MANY, ONE = "10,000 tiny tensors", "one tensor of the same size"


def tiny_against_one(device: str) -> dict[str, dict[str, Callable]]:
    """name -> {MANY, ONE: a step of it on as many elements}"""
    sizes = {MANY: SHAPES["tiny"](), ONE: [(numel(SHAPES["tiny"]()),)]}
    return {
        name: {size: make(parameters(shapes, device), lr=1e-4).step for size, shapes in sizes.items()}
        for name, make in (("LAMB", largebatch.LAMB), ("LARS", largebatch.LARS))
    }


READS_ADAM, READS_SGD = "(reading what Adam reads, tensor by tensor)", "(reading what SGD reads, tensor by tensor)"


def plain_reading(shapes: list[Shape]) -> dict[str, Callable]:
    """Weights, gradients and state on the CPU read once, one tensor after another, by our own sums of squares.

    Not a floor: a step that reads four tensors side by side keeps more reads under way, and can be faster.
    """
    kernels = dispatch.choose("cpu", "auto")
    tensors = [torch.ones(s) for s in shapes for _ in range(4)]
    fewer = [t for i, t in enumerate(tensors) if i % 4 < 3]
    # no rule: only gradients are looked at
    everything, fewer = (Segments(None, torch.device("cpu"), torch.float32, grads=grads) for grads in (tensors, fewer))
    return {READS_ADAM: lambda: kernels.grad_square_sum(everything), READS_SGD: lambda: kernels.grad_square_sum(fewer)}


def bytes_per_parameter(contestant: str, device: str) -> int | None:
    """What a step must move, read and written; None where half of it is in 16 bits."""
    if "bf16" in contestant:
        return None
    if contestant in (READS_ADAM, READS_SGD):
        return 16 if contestant == READS_ADAM else 12
    if any(word in contestant for word in ("SGD", "LARS", "Lars")):
        return SGD_BYTES
    return GPU_LAMB_BYTES if device == "cuda" and "LAMB" in contestant.upper() else ADAM_BYTES


def share_of(bandwidth: float, contestant: str, num_parameters: int, seconds: float, device: str) -> str:
    """Of what a copy moves in that time, what the step must have moved."""
    moved = bytes_per_parameter(contestant, device)
    return "" if moved is None else f"{moved * num_parameters / seconds / bandwidth:.0%}"


def row(name: str, timing: Timing, adam: float, sgd: float, share: str) -> str:
    low, high = timing.percentile(0.2) * 1e3, timing.percentile(0.8) * 1e3
    ratios = f"{timing.median / adam:.2f} | {timing.median / sgd:.2f}"
    return f"| {name} | {timing.median * 1e3:.2f} | {low:.2f} | {high:.2f} | {ratios} | {share} |"


def time_shapes(name: str, shapes: list[Shape], device: str, num_rounds: int) -> tuple[list[str], dict]:
    """One table: every optimizer on these shapes, and what a copy moves before and after, because machines are shared."""
    is_large = numel(shapes) > 100e6
    contestants, absent = peers(device)
    if is_large:  # memory: the slow ones are left out, and all share weights and gradients
        contestants = {n: c for n, c in contestants.items() if "fused" in n or "Fused" in n or n.startswith("timm")}
    contestants = ours(device) | contestants
    shared = parameters(shapes, device) if is_large else None
    steps = {n: make(shared or parameters(shapes, device)).step for n, make in contestants.items()}
    if not is_large:
        steps |= flat_partitions(shapes, device) | (plain_reading(shapes) if device == "cpu" else {})
    before = copy_bandwidth(device)
    timings = interleaved(steps, num_rounds=num_rounds, device=device)
    after = copy_bandwidth(device)
    bandwidth = (before + after) / 2
    adam, sgd = timings["torch AdamW (fused)"].median, timings["torch SGD (fused)"].median
    lines = [
        f"## {name}: {numel(shapes):,} parameters in {len(shapes):,} tensors",
        "",
        f"A copy moves {before / 1e9:.0f} GB/s before these rounds and {after / 1e9:.0f} GB/s after them.",
        "",
        "| optimizer | median ms | p20 | p80 | / AdamW fused | / SGD fused | share of copy bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for contestant, timing in sorted(timings.items(), key=lambda item: item[1].median):
        share = share_of(bandwidth, contestant, numel(shapes), timing.median, device)
        lines.append(row(contestant, timing, adam, sgd, share))
    lines += [""] + [f"Not there: {reason}" for reason in absent] + [""]
    return lines, {n: t.median for n, t in timings.items()}


def time_growth(device: str, num_rounds: int, largest: float) -> list[str]:
    """Nanoseconds a parameter as the work grows, and the host's part of a step."""
    lines = [
        "## As the work grows",
        "",
        "| parameters (tensors of 1M) | LAMB ns each | LARS ns each |",
        "|---|---|---|",
    ]
    for count in (1, 3, 10, 30, 100, 300):
        if count * 1e6 > largest:
            continue
        made = parameters([(1000, 1000)] * count, device)
        cells = []
        for optimizer in (largebatch.LAMB(made, lr=1e-4, weight_decay=0.01), largebatch.LARS(made, lr=1e-4)):
            timing = interleaved({"step": optimizer.step}, num_rounds=max(7, num_rounds // 2), device=device)["step"]
            cells.append(f"{timing.median / (count * 1e6) * 1e9:.3f}")
            optimizer.state.clear()
        lines.append(f"| {count}M | {' | '.join(cells)} |")
    overheads = {}
    for name, make in (ours(device) | {"torch AdamW (fused)": fused_adamw}).items():
        step = make(parameters([(16,)] * 161, device)).step
        timing = interleaved({"step": step}, num_rounds=200, num_warm_up=20, device=device)["step"]
        overheads[name] = f"{name} {timing.median * 1e6:.0f} us"
    lines += ["", f"A whole step of 161 tensors of 16 elements (host overhead): {', '.join(overheads.values())}.", ""]
    for name, steps in tiny_against_one(device).items():
        timings = interleaved(steps, num_rounds=num_rounds, device=device)
        ratio = timings[MANY].median / timings[ONE].median
        lines.append(
            f"- {name}, {MANY}: {timings[MANY].median * 1e3:.2f} ms; {ONE}: {timings[ONE].median * 1e3:.2f} ms; "
            f"ratio {ratio:.2f}"
        )
    return [*lines, ""]


def time_offload(device: str, num_rounds: int) -> list[str]:
    """The step that ZeRO-Offload takes: one flat partition in fp32, beside the optimizer that DeepSpeed has for it."""
    if device != "cpu":
        return []
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    lines = [
        "## Under ZeRO-Offload",
        "",
        "| | DeepSpeedCPUAdam, ms | LAMB, ms | ratio | LARS, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("resnet50", "bert-large"):
        shapes = SHAPES[name]()
        flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters(shapes, device)]))
        flat.grad = torch.full_like(flat, 1e-3)
        steps = {
            "Adam": DeepSpeedCPUAdam([flat], lr=1e-4, weight_decay=0.01).step,
            "LAMB": flattened(largebatch.LAMB, shapes, device, lr=1e-4, weight_decay=0.01, overwrite_grads=True).step,
            "LARS": flattened(largebatch.LARS, shapes, device, lr=1e-4, weight_decay=0.01).step,
        }
        timings = interleaved(steps, num_rounds=max(5, num_rounds // 3), device=device)
        adam, lamb, lars = (timings[step].median * 1e3 for step in steps)
        lines.append(f"| {name} | {adam:.1f} | {lamb:.1f} | {lamb / adam:.2f} | {lars:.1f} | {lars / adam:.2f} |")
    return [*lines, ""]


def time_compiled(device: str, num_rounds: int) -> list[str]:
    """What rules without kernels of their own get, beside the fused kernels of the same rule."""
    lines = ["## Through torch.compile", "", "| ResNet-50 | fused, ms | compiled, ms | ratio |", "|---|---|---|---|"]
    for optimizer_class in (largebatch.LAMB, largebatch.LARS, largebatch.LANS):
        steps = {
            kernels: optimizer_class(parameters(SHAPES["resnet50"](), device), lr=1e-4, kernels=kernels).step
            for kernels in ("auto", "compiled")
        }
        timings = interleaved(steps, num_rounds=max(7, num_rounds // 2), device=device)
        fused, compiled = (timings[kernels].median * 1e3 for kernels in steps)
        lines.append(f"| {optimizer_class.__name__} | {fused:.1f} | {compiled:.1f} | {compiled / fused:.2f} |")
    return [*lines, ""]


def plot(medians: dict[str, dict[str, float]], path: pathlib.Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print('no plot: matplotlib is not installed (pip install "largebatch[plots]")')
        return
    figure, axes = plt.subplots(1, len(medians), figsize=(5 * len(medians), 5), squeeze=False)
    for ax, (name, values) in zip(axes[0], medians.items(), strict=True):
        adam = values["torch AdamW (fused)"]
        items = sorted(values.items(), key=lambda item: -item[1])
        own = {"LAMB", "LARS"}
        colours = ["tab:red" if n.split(",")[0] in own else "tab:grey" for n, _ in items]
        ax.barh([n for n, _ in items], [v / adam for _, v in items], color=colours)
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_title(name)
        ax.set_xlabel("time of a step / torch AdamW (fused)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def have_tests_passed(device: str) -> bool:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "kernels")]
    if subprocess.run(tests + (["-k", "not triton"] if device == "cpu" else []), cwd=ROOT).returncode == 0:
        return True
    print("the kernels' tests fail; nothing was timed")
    return False


def command() -> str:
    """How to call this again; where the report went does not matter."""
    arguments = [a for i, a in enumerate(sys.argv[1:], 1) if a != "--report" and sys.argv[i - 1] != "--report"]
    return " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *arguments])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", default="lenet,davidnet,resnet50,alexnet,bert-large,tiny")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--largest", type=float, default=300e6, help="parameters of the largest growth case")
    parser.add_argument("--report", type=pathlib.Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = arguments.device
    if not have_tests_passed(device):
        return 1
    name = f"kernels_{device}_{datetime.date.today()}.md"
    path = arguments.report or ROOT / "benchmarks" / "reports" / name
    lines = preamble("What a step costs", device, command())
    backend = dispatch.choose(device, "auto")
    lines += [
        f"Kernels: {backend.name}"
        + (f" ({backend.module.instruction_sets()[0]})" if backend.name == "cpp" else "")
        + f". fp32. All optimizers once a round, {arguments.rounds} rounds. Share of copy bandwidth (read and written): "
        f"{ADAM_BYTES} bytes a parameter for Adam and LAMB"
        + (f" ({GPU_LAMB_BYTES} for LAMB here)" if device == "cuda" else "")
        + f", {SGD_BYTES} for SGD and LARS, over the time and the copy's bandwidth.",
        "",
    ]
    medians = {}
    for shapes_name in arguments.shapes.split(","):
        table, medians[shapes_name] = time_shapes(shapes_name, SHAPES[shapes_name](), device, arguments.rounds)
        print("\n".join(table), flush=True)
        lines += table
    growth = time_growth(device, arguments.rounds, arguments.largest) + time_offload(device, arguments.rounds)
    growth += time_compiled(device, arguments.rounds)
    print("\n".join(growth))
    path.write_text("\n".join([*lines, *growth]).rstrip() + "\n")
    plot({n: m for n, m in medians.items() if n in ("resnet50", "bert-large")} or medians, path.with_suffix(".png"))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
