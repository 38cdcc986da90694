"""What a step of the Triton kernels costs on the host beside torch's fused optimizers; needs no GPU.

    python benchmarks/host_cost.py [--rounds 31] [--report FILE.md]

Everything runs but what a device would do: our launches are stubbed below Triton's binder (tests/support/triton_stand_in.py),
torch's steps at their fused operator, and tensors lie in the host's memory. "Same gradients" lie where they lay in the last
step; "other gradients" lie elsewhere in every step, so that their addresses are told anew. Operators are those of torch that
a step calls, which would be launches of their own on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import torch  # noqa: E402
from harness import interleaved, preamble  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import largebatch  # noqa: E402
from largebatch.kernels import dispatch, triton_gpu  # noqa: E402
from support.triton_stand_in import StandInDriver, use  # noqa: E402

OPTIMIZERS: dict[str, Callable] = {
    "torch AdamW (fused)": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01, fused=True),
    "torch SGD (fused)": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True),
    "LAMB": lambda p: largebatch.LAMB(p, lr=1e-4, weight_decay=0.01),
    "LAMB, clip": lambda p: largebatch.LAMB(p, lr=1e-4, weight_decay=0.01, max_grad_norm=1.0),
    "LANS": lambda p: largebatch.LANS(p, lr=1e-4, weight_decay=0.01),
    "LARS": lambda p: largebatch.LARS(p, lr=1e-4, weight_decay=1e-4),
}
HEAD = "| optimizer | same gradients, ms | p20 | p80 | other gradients, ms | p20 | p80 | launches | operators |"


class Operators(TorchDispatchMode):
    """Counts what torch is asked to compute inside; a view computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Contestant:
    """An optimizer with two sets of gradients, one of which its weights have."""

    def __init__(self, make: Callable, shapes: list[Shape]):
        self.weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        self.gradients = itertools.cycle([[torch.ones_like(w) for w in self.weights] for _ in range(2)])
        self.optimizer = make(self.weights)
        self.give_others()
        for _ in range(3):
            self.optimizer.step()

    def give_others(self) -> None:
        for weight, gradient in zip(self.weights, next(self.gradients), strict=True):
            weight.grad = gradient


def seconds_of(step: tuple[Contestant, bool]) -> float:
    """Of this thread's processor time, which nothing else on the machine lengthens; of a step with other gradients or the same."""
    contestant, gets_others = step
    if gets_others:
        contestant.give_others()
    start = time.thread_time()
    contestant.optimizer.step()
    return time.thread_time() - start


def timed(name: str, shapes: list[Shape], num_rounds: int, driver: StandInDriver) -> list[str]:
    """A table in Markdown."""
    contestants = {name: Contestant(make, shapes) for name, make in OPTIMIZERS.items()}
    steps = {(name, others): (contestants[name], others) for name in contestants for others in (False, True)}
    timings = interleaved(steps, num_rounds=num_rounds, clock=seconds_of)
    lines = [f"## {name}: {len(shapes):,} tensors", "", HEAD, "|---" * 9 + "|"]
    for name, contestant in contestants.items():
        driver.launches.clear()
        with Operators() as operators:
            contestant.optimizer.step()
        cells = [
            f"{t.median * 1e3:.3f} | {t.percentile(0.2) * 1e3:.3f} | {t.percentile(0.8) * 1e3:.3f}"
            for t in (timings[name, others] for others in (False, True))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(driver.launches) or ''} | {len(operators.names)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--report", type=pathlib.Path, metavar="FILE.md")
    arguments = parser.parse_args()
    driver = use(90)
    kernels = triton_gpu.TritonKernels()
    dispatch.choose = lambda device_type, requested: kernels
    for operator in ("_fused_adamw_", "_fused_sgd_"):
        setattr(torch, operator, lambda *_, **__: None)
    lines = preamble(
        "What a step costs on the host", "cpu", f"python benchmarks/host_cost.py --rounds {arguments.rounds}"
    )
    for name in ("resnet50", "tiny"):
        lines += timed(name, SHAPES[name](), arguments.rounds, driver)
    print("\n".join(lines))
    if arguments.report:
        arguments.report.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
