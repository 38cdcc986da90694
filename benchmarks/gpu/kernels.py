"""What a step costs on the GPU beside the other optimizers: by the host's clock, waits included, and by the device's own.

The contestants are those of benchmarks/kernels.py; all take a step once a round. One that fails is named with its reason and
left out. If it leaves the device unusable, a new process goes on without it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import kernels
import torch
from harness import copy_bandwidth, device_clock, host_clock, interleaved
from shapes import SHAPES, numel

from gpu.builds import usable
from gpu.report import Report, measured_head, stage_arguments

SHAPE_NAMES = ("resnet50", "tiny", "alexnet", "bert-large")
LARGE = 100e6
"""Parameters above which all optimizers share weights and gradients."""

SLOW = 0.1
"""Seconds a step from which on an optimizer gets few rounds."""

NUM_ROUNDS, NUM_SLOW_ROUNDS = 25, 2
NAMES_BETWEEN = ";"


class UnusableDeviceError(RuntimeError):
    """A contestant broke the device for this process; holds its name and why."""


class Contestants(NamedTuple):
    steps: dict[str, Callable[[], object]]
    seconds: dict[str, float]
    """Of the last step of a few."""
    absent: list[str]


def probed(makers: dict[str, Callable[[], Callable]], device: str) -> Contestants:
    """The steps that work, each taken three times, or until it is slow.

    Raises:
        UnusableDeviceError: nothing works on the device any more.
    """
    found, clock = Contestants({}, {}, []), host_clock(device)
    for name, make in makers.items():
        try:
            step = make()
            for _ in range(3):
                found.seconds[name] = clock(step)
                if found.seconds[name] > SLOW:
                    break
            found.steps[name] = step
        except Exception as error:  # a contestant may fail in any way of its own
            found.absent.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if device == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    raise UnusableDeviceError(name, found.absent[-1]) from error
    return found


def makers_for(shapes, device: str, without: dict[str, str]) -> tuple[dict[str, Callable[[], Callable]], list[str]]:
    """name -> a function that makes a step; and the peers that are not there."""
    peers, absent = kernels.peers(device, without)
    is_large = numel(shapes) > LARGE
    shared = kernels.parameters(shapes, device) if is_large else None

    def maker(constructor: Callable) -> Callable[[], Callable]:
        return lambda: constructor(shared or kernels.parameters(shapes, device)).step

    made = {name: maker(constructor) for name, constructor in (kernels.ours(device) | peers).items()}
    for name, (optimizer_class, decay) in kernels.FLAT.items():
        options = {"lr": 1e-4, "weight_decay": decay}
        made[name] = lambda c=optimizer_class, o=options: kernels.flattened(c, shapes, device, **o).step
    return {name: make for name, make in made.items() if name not in without}, absent


def time_shapes(name: str, shapes, arguments, without: dict[str, str], seconds: float) -> tuple[list[str], dict]:
    """Two tables in Markdown, and the same figures as numbers."""
    device = arguments.device
    makers, absent = makers_for(shapes, device, without)
    found = probed(makers, device)
    absent += found.absent
    rounds_cost = sum(t for t in found.seconds.values() if t <= SLOW) * 3 or 1e-3
    rounds = max(3, min(NUM_ROUNDS, int(seconds / rounds_cost))) if device == "cuda" else 2
    before = copy_bandwidth(device)
    medians: dict[str, dict] = {}
    lines = [f"## {name}: {numel(shapes):,} parameters in {len(shapes):,} tensors", ""]
    for title, clock in (("by the host's clock, from an idle device to an idle device", host_clock(device)),
                         ("on the device, between two events", device_clock(device))):  # fmt: skip
        timings = {}
        for is_slow, num_rounds in ((False, rounds), (True, min(rounds, NUM_SLOW_ROUNDS))):
            group = {n: step for n, step in found.steps.items() if (found.seconds[n] > SLOW) == is_slow}
            warm_up = int(not is_slow)
            timings |= interleaved(group, num_rounds=num_rounds, num_warm_up=warm_up, device=device, clock=clock)
        after = copy_bandwidth(device)
        adam, sgd = (timings[n].median for n in ("torch AdamW (fused)", "torch SGD (fused)"))
        slow = (
            f"; {min(rounds, NUM_SLOW_ROUNDS)} of those that take more than {SLOW} s"
            if max(found.seconds.values()) > SLOW
            else ""
        )
        lines += [f"{title[0].upper()}{title[1:]}; {rounds} rounds{slow}. A copy moves {after / 1e9:.0f} GB/s.", ""]
        lines += [
            "| optimizer | median ms | p20 | p80 | / AdamW fused | / SGD fused | MB to move | share of the copy |"
        ]
        lines += ["|---" * 8 + "|"]
        for contestant, timing in sorted(timings.items(), key=lambda item: item[1].median):
            moved = kernels.bytes_per_parameter(contestant, device)
            share = kernels.share_of((before + after) / 2, contestant, numel(shapes), timing.median, device)
            megabytes = "" if moved is None else f"{moved * numel(shapes) / 1e6:.1f}"
            lines.append(kernels.row(contestant, timing, adam, sgd, f"{megabytes} | {share}"))
        lines.append("")
        medians[title] = {n: [t.median, t.percentile(0.2), t.percentile(0.8)] for n, t in timings.items()}
    return lines + [f"Not there: {reason}" for reason in absent] + [""], medians


def main() -> int:
    arguments = stage_arguments(__doc__, without="", shapes=",".join(SHAPE_NAMES))
    report = Report(arguments)
    without = {name: "left the device unusable" for name in arguments.without.split(NAMES_BETWEEN) if name}
    if not arguments.without:
        report.add(*measured_head("What a step costs", arguments))
        report.add(
            f"fp32. To move: {kernels.ADAM_BYTES} bytes a parameter for Adam ({kernels.GPU_LAMB_BYTES} for LAMB, in two passes, "
            f"if nothing stays in the cache), {kernels.SGD_BYTES} for SGD and LARS. Share: of what a copy moves in that time."
            + ("" if arguments.device == "cuda" else " There are no events on a CPU: both clocks are the host's."),
            "",
        )
    sys.path += [str(arguments.work / "apex")] + ([str(arguments.apex)] if arguments.apex else [])
    if arguments.device == "cuda":
        without |= {name: reason for name, reason in usable(arguments.results).items() if reason}
    else:
        without["DeepSpeedCPUAdam"] = "it would be compiled first"
    names = ["lenet"] if arguments.rehearse else arguments.shapes.split(",")
    figures = {}
    for place, name in enumerate(names):
        try:
            seconds = 0.6 * (report.left - 5) / (len(names) - place)
            lines, figures[name] = time_shapes(name, SHAPES[name](), arguments, without, seconds)
        except UnusableDeviceError as error:
            culprit, reason = error.args
            report.add(f"{reason}: the device is unusable for this process; another goes on without it.", "")
            if arguments.without.count(NAMES_BETWEEN) > 4 or culprit in without:
                print(f"{culprit} leaves the device unusable")
                return 1
            again = [
                sys.executable,
                "-m",
                "gpu.kernels",
                "--results",
                str(arguments.results),
                "--work",
                str(arguments.work),
            ]
            again += ["--seconds", f"{report.left:.1f}", "--shapes", ",".join(names[place:])]
            again += ["--without", f"{arguments.without}{culprit}{NAMES_BETWEEN}"]
            again += ["--apex", str(arguments.apex)] if arguments.apex else []
            os.execv(sys.executable, again)
        except Exception as error:  # the other shapes may do
            report.add(f"## {name}", "", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", "")
            continue
        report.add(*lines)
        with open(arguments.results / f"{name}.json", "w") as file:
            json.dump(figures[name], file, indent=1)
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    if report.left > 15:
        largest = 300e6 if arguments.device == "cuda" else 1e6
        report.add(*kernels.time_growth(arguments.device, 9 if arguments.device == "cuda" else 1, largest))
    missing = [name for name in names if name not in figures]
    print(f"could not be timed: {', '.join(missing)}" if missing else "all shapes were timed")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
