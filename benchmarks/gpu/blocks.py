"""Which sizes of chunk and block, and how many warps, make a step of LAMB and of LARS fastest on ResNet-50's tensors.

The constants of largebatch.kernels are replaced from outside: CHUNK_NUMEL (what a program works on), BLOCK_BYTES (what it
loads at once of each array), and ``num_warps`` of every launch. What could not be replaced, because the kernels have changed, is said.
Processes of their own compile all variants first, side by side; then one process times them, interleaved.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from harness import device_clock, interleaved
from kernels import parameters
from shapes import SHAPES

import largebatch
from gpu.report import Report, measured_head, stage_arguments

CONSTANTS = ("CHUNK_NUMEL", "BLOCK_BYTES")
MODULES = ("largebatch.kernels.triton_gpu", "largebatch.kernels.triton_kernels")
OPTIMIZERS = {"LAMB": {"weight_decay": 0.01}, "LARS": {"weight_decay": 1e-4}}
NUM_COMPILERS = 16


class Variant(NamedTuple):
    chunk: int
    block: int
    warps: int


VARIANTS = [Variant(c, b, w) for c in (4096, 8192, 16384, 32768) for b, w in ((1024, 4), (2048, 8), (1024, 8))]
VARIANTS += [Variant(8192, 512, 4), Variant(2048, 1024, 4), Variant(8192, 4096, 8), Variant(8192, 2048, 4)]


class Launched:
    """A kernel whose launches get so many warps; keeps the arguments of the last of them."""

    def __init__(self, kernel: Any, warps: int):
        self.kernel, self.warps, self.last = kernel, warps, None

    def __getitem__(self, grid: Any):
        def call(*arguments: Any, **named: Any) -> Any:
            self.last = named
            return self.kernel[grid](*arguments, **named | {"num_warps": self.warps})

        return call


@contextlib.contextmanager
def varied(variant: Variant) -> Iterator[list[Launched]]:
    """Inside, the kernels have the variant's sizes; yields those that are launched by another number of warps."""
    import largebatch.kernels.triton_gpu  # noqa: F401

    before, launched = [], []
    for name in MODULES:
        module = sys.modules.get(name)
        for attribute, value in list(vars(module).items()) if module else []:
            if attribute in CONSTANTS:
                new = variant.chunk if attribute == "CHUNK_NUMEL" else 4 * variant.block
            elif name == MODULES[0] and attribute.endswith("_kernel") and hasattr(value, "fn"):
                new = Launched(value, variant.warps)
                launched.append(new)
            else:
                continue
            before.append((module, attribute, value))
            setattr(module, attribute, new)
    try:
        yield launched
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)


def steps_of(variant: Variant, arguments) -> tuple[dict[str, Any], list[str]]:
    """name -> a step, after two of each; and which of the variant's sizes were not in force."""
    shapes = [(3000,), (70,)] if arguments.rehearse else SHAPES["resnet50"]()
    steps = {}
    with varied(variant) as launched:
        for name, options in OPTIMIZERS.items():
            weights = parameters(shapes, arguments.device)
            steps[name] = getattr(largebatch, name)(weights, lr=1e-4, kernels="triton", **options).step
            for _ in range(2):
                steps[name]()
    used = [call.last for call in launched if call.last is not None]
    missed = [] if used else ["num_warps"]
    for key, wanted in (("CHUNK", variant.chunk), ("BLOCK", variant.block)):
        # the kernel that works on layers has blocks of another kind
        if not any(last.get(key) == wanted for last in used):
            missed.append(key)
    return steps, missed


def within(step: Any, variant: Variant) -> Any:
    def call() -> None:
        with varied(variant):
            step()

    return call


def compile_all(variants: list[Variant], arguments, report: Report) -> list[Variant]:
    """Those that compile and run, each tried in a process of its own."""
    waiting, running, good = list(variants), {}, []
    command = [sys.executable, "-m", "gpu.blocks", "--results", str(arguments.results), "--work", str(arguments.work)]
    command += ["--rehearse"] * arguments.rehearse
    while (waiting or running) and report.left > 10:
        while waiting and len(running) < NUM_COMPILERS:
            variant = waiting.pop(0)
            more = ["--variant", json.dumps(variant)]
            running[variant] = subprocess.Popen(
                command + more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        time.sleep(0.1)
        for variant, process in list(running.items()):
            if process.poll() is not None:
                del running[variant]
                said = process.stdout.read().strip().splitlines() or ["it said nothing"]
                if process.returncode == 0:
                    good.append(variant)
                else:
                    report.add(f"- {variant}: does not run: {said[-1][:300]}")
    for variant in [*waiting, *running]:
        report.add(f"- {variant}: not compiled in time")
    for process in running.values():
        process.kill()
    return [variant for variant in variants if variant in good]


def main() -> int:
    arguments = stage_arguments(__doc__, variant="")
    if arguments.variant:
        steps_of(Variant(*json.loads(arguments.variant)), arguments)
        return 0
    report = Report(arguments)
    report.add(*measured_head("Sizes of chunk and block, numbers of warps", arguments))
    variants = [Variant(1024, 512, 4), Variant(2048, 1024, 4)] if arguments.rehearse else VARIANTS
    variants = compile_all(variants, arguments, report)
    contestants, missed = {}, {}
    for variant in variants:
        steps, missed[variant] = steps_of(variant, arguments)
        contestants |= {(variant, name): within(step, variant) for name, step in steps.items()}
    if not contestants:
        print("no variant runs")
        return 1
    rounds = 2 if arguments.rehearse else 15
    timings = interleaved(
        contestants, num_rounds=rounds, num_warm_up=1, device=arguments.device, clock=device_clock(arguments.device)
    )
    report.add("", "Milliseconds on the device, median (p20, p80). All variants once a round.", "")
    report.add(
        "| chunk | block | warps | " + " | ".join(OPTIMIZERS) + " | not in force |",
        "|---" * (4 + len(OPTIMIZERS)) + "|",
    )
    for variant in sorted(variants, key=lambda v: sum(timings[v, name].median for name in OPTIMIZERS)):
        cells = [
            f"{t.median * 1e3:.3f} ({t.percentile(0.2) * 1e3:.3f}, {t.percentile(0.8) * 1e3:.3f})"
            for t in (timings[variant, name] for name in OPTIMIZERS)
        ]
        report.add(f"| {' | '.join(map(str, variant))} | {' | '.join(cells)} | {', '.join(missed[variant])} |")
    if torch.cuda.is_available():
        report.add("", f"Memory taken: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
