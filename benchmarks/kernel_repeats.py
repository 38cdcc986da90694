"""The limits that the CPU kernels are held to, measured again and again, after the kernels' tests have passed.

    python benchmarks/kernel_repeats.py [--repeats 12] [--rounds 15] [--report FILE.md]

The memory of a shared machine changes its speed for seconds or minutes, and with it the ratios: each repeat is a line of its
own, beside what a copy moves before and after it.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from harness import copy_bandwidth, interleaved, preamble
from kernels import MANY, ONE, command, flat_partitions, have_tests_passed, ours, parameters, peers, tiny_against_one
from shapes import SHAPES

from largebatch.kernels import dispatch


@dataclass(frozen=True)
class Limit:
    """A ratio of two contestants' medians, and where it is to lie."""

    title: str
    of: str
    to: str
    at_most: float = float("inf")
    at_least: float = 0.0

    def is_kept(self, ratio: float) -> bool:
        return self.at_least <= ratio <= self.at_most

    @property
    def wanted(self) -> str:
        return f"<= {self.at_most:g}" if self.at_least == 0.0 else f">= {self.at_least:g}"


ADAMW, SGD, TIMM_LAMB, TIMM_LARS = "torch AdamW (fused)", "torch SGD (fused)", "timm Lamb", "timm Lars"
LIMITS = (
    Limit("LAMB / AdamW fused", "LAMB", ADAMW, at_most=1.10),
    Limit("LARS / SGD fused", "LARS", SGD, at_most=1.10),
    Limit("timm Lamb / LAMB", TIMM_LAMB, "LAMB", at_least=6),
    Limit("timm Lars / LARS", TIMM_LARS, "LARS", at_least=4),
    Limit("flat / whole, LAMB", "LAMB, flat partition", "LAMB", at_most=1.10),
    Limit("flat / whole, LARS", "LARS, flat partition", "LARS", at_most=1.10),
    Limit("tiny / one, LAMB", f"LAMB, {MANY}", f"LAMB, {ONE}", at_most=2),
    Limit("tiny / one, LARS", f"LARS, {MANY}", f"LARS, {ONE}", at_most=2),
)


def contestants() -> tuple[list[dict[str, Callable]], list[str]]:
    """Two groups of steps, each interleaved by itself: ResNet-50, tiny tensors. And what could not be had, with the reason."""
    shapes, (found, absent) = SHAPES["resnet50"](), peers("cpu")
    made = {name: make for name, make in (ours("cpu") | found).items() if any(name in (li.of, li.to) for li in LIMITS)}
    resnet50 = {name: make(parameters(shapes, "cpu")).step for name, make in made.items()} | flat_partitions(
        shapes, "cpu"
    )
    tiny = {f"{n}, {size}": step for n, steps in tiny_against_one("cpu").items() for size, step in steps.items()}
    return [resnet50, tiny], [reason for reason in absent if reason.startswith((TIMM_LAMB, TIMM_LARS))]


def summary(rows: list[dict[Limit, float]], limits: list[Limit]) -> list[str]:
    """For each limit the smallest, the median and the largest ratio, and in how many repeats it was kept."""
    lines = ["| ratio | limit | smallest | median | largest | kept in |", "|---|---|---|---|---|---|"]
    for limit in limits:
        ratios = [row[limit] for row in rows]
        figures = " | ".join(f"{f(ratios):.2f}" for f in (min, statistics.median, max))
        kept = sum(map(limit.is_kept, ratios))
        lines.append(f"| {limit.title} | {limit.wanted} | {figures} | {kept} of {len(rows)} |")
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15, help="of each repeat")
    parser.add_argument(
        "--instruction_sets", nargs="+", help="of our kernels, e.g. avx2; default: all that this processor has"
    )
    parser.add_argument("--report", type=pathlib.Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if not have_tests_passed("cpu"):
        return 1
    module = dispatch.choose("cpu", "cpp").module
    instruction_sets = arguments.instruction_sets or module.instruction_sets()
    groups, absent = contestants()
    limits = [limit for limit in LIMITS if any({limit.of, limit.to} <= steps.keys() for steps in groups)]
    lines = preamble("The limits of the CPU kernels, measured again and again", "cpu", command())
    lines += [
        "ResNet-50's 161 tensors and 10,000 tiny ones, fp32. A line is one repeat with one instruction set of our kernels (torch takes "
        f"its own): every optimizer once a round, medians of {arguments.rounds} rounds, what a copy moves (GB/s) before and after, ms of "
        "AdamW and SGD.",
        *[f"Not there: {reason}" for reason in absent],
        "",
        "| instructions | copy | AdamW fused | SGD fused | " + " | ".join(limit.title for limit in limits) + " |",
        "|" + "---|" * (4 + len(limits)),
    ]
    print("\n".join(lines), flush=True)
    rows: dict[str, list[dict[Limit, float]]] = {name: [] for name in instruction_sets}
    for name in [name for _ in range(arguments.repeats) for name in instruction_sets]:
        module.use_instruction_set(name)
        before = copy_bandwidth("cpu")
        medians = {n: t.median for g in groups for n, t in interleaved(g, num_rounds=arguments.rounds).items()}
        after = copy_bandwidth("cpu")
        rows[name].append({limit: medians[limit.of] / medians[limit.to] for limit in limits})
        cells = [f"{before / 1e9:.0f}, {after / 1e9:.0f}", f"{medians[ADAMW] * 1e3:.2f}", f"{medians[SGD] * 1e3:.2f}"]
        lines.append("| " + " | ".join([name, *cells, *(f"{ratio:.2f}" for ratio in rows[name][-1].values())]) + " |")
        print(lines[-1], flush=True)
    for name in instruction_sets:
        lines += ["", f"## All repeats, {name}", "", *summary(rows[name], limits)]
        print("\n".join(lines[-len(limits) - 5 :]))
    if arguments.report:
        arguments.report.write_text("\n".join(lines).rstrip() + "\n")
        print(f"written to {arguments.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
