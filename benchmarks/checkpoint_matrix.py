"""Every pair of layouts: save at one, resume at the other, and compare with the run that was never interrupted.

    python benchmarks/checkpoint_matrix.py [--samples 120] [--report docs/results/checkpoints.md]

World sizes 1 to 4 x ZeRO stages 0 to 3 give 16 layouts and 256 pairs, for LARS and LAMB 512 resumes through the real engine: 3
steps, a checkpoint, 3 steps at the other layout, under a changing learning rate, on a model whose gradients are the same bits
at every layout. Then pairs drawn at random over precision, offload, accumulation steps, sub-group size and the four optimizers,
too. Expected: the masters of plain PyTorch within 3e-6 relative, every trust ratio of the last step the same bits, and on the
diagonal the very bits of the run that went on. Exits with 1 if one is not so.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(ROOT / "tests"))

import deepspeed  # noqa: E402
import torch  # noqa: E402

from support import checkpoint_runs, engine_runs  # noqa: E402
from support.problems import relative_error  # noqa: E402
from support.rank_pool import RankPool  # noqa: E402

BOUND = 3e-6
LAYOUTS = [(world_size, {"stage": stage}) for world_size in (1, 2, 3, 4) for stage in (0, 1, 2, 3)]
Layout = tuple[int, dict[str, Any]]


class Campaign:
    """Runs and what came of them."""

    def __init__(self, folder: str):
        self.pool, self.folder = RankPool(), folder
        self.ends: dict[str, Any] = {}
        self.expected: dict[Any, Any] = {}

    def save(self, algorithm: str, layout: Layout, num_groups: int) -> str:
        """Tag of the checkpoint, made if it is not there."""
        tag = f"{algorithm}{layout[0]}{sorted(layout[1].items())}{num_groups}".translate(
            {ord(c): "" for c in " '\"[](){}:,/"}
        )
        if tag not in self.ends:
            self.ends[tag] = self.pool.run(
                layout[0], checkpoint_runs.save_at, algorithm, layout[1], self.folder, tag, num_groups
            )
        return tag

    def resume(self, algorithm: str, saved: Layout, layout: Layout, num_groups: int = 1) -> dict[str, Any]:
        """Largest relative difference of the masters, and whether ratios and bits are the same."""
        tag = self.save(algorithm, saved, num_groups)
        results = self.pool.run(
            layout[0], checkpoint_runs.resume_at, algorithm, layout[1], self.folder, tag, num_groups
        )
        key = (algorithm, num_groups)
        if key not in self.expected:
            self.expected[key] = checkpoint_runs.uninterrupted(*key)
        _, weights, ratios = self.expected[key]
        return {
            "error": relative_error(engine_runs.assemble([r["pieces"] for r in results]), weights),
            "has_ratios": all(r["ratios"] == ratios for r in results),
            "has_bits": saved == layout and checkpoint_runs.same_bits(self.ends[tag], results),
        }


def kind_of_pair(saved: Layout, layout: Layout) -> str:
    if saved == layout:
        return "the same layout"
    if saved[0] == layout[0]:
        return "another stage"
    return "another world size" if saved[1] == layout[1] else "another world size and stage"


def random_layout(generator: random.Random) -> Layout:
    """One that DeepSpeed has: no offload at stage 0, fp32 accumulation not there either."""
    stage = generator.choice((0, 1, 2, 3))
    layout: dict[str, Any] = {"stage": stage, "dtype": generator.choice(("fp32", "bf16", "fp16"))}
    zero: dict[str, Any] = {}
    if stage and generator.random() < 0.4:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero["sub_group_size"] = generator.choice((300, 700, 10**9))
        if generator.random() < 0.3:
            zero["offload_param"] = {"device": "cpu"}
    if stage in (1, 2):
        zero["round_robin_gradients"] = generator.random() < 0.3
    if stage and layout["dtype"] != "fp32" and generator.random() < 0.5:
        layout["grad_accum"] = "fp32"
    if generator.random() < 0.3:
        layout["accumulation"] = 2
    return generator.choice((1, 2, 3, 4)), layout | ({"zero": zero} if zero else {})


def table(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| | resumes | largest relative difference | all trust ratios the same bits |", "|---|---|---|---|"]
    for name, found in rows.items():
        ratios = sum(r["has_ratios"] for r in found)
        lines.append(f"| {name} | {len(found)} | {max(r['error'] for r in found):.1e} | {ratios} of {len(found)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=120, help="random pairs over everything else")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--report", metavar="MD")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None, prefix="checkpoint_matrix_")
    campaign, start = Campaign(folder), time.perf_counter()
    try:
        pairs = defaultdict(list)
        for algorithm in ("LARS", "LAMB", "LANS"):
            for saved in LAYOUTS:
                for layout in LAYOUTS:
                    found = campaign.resume(algorithm, saved, layout)
                    pairs[f"{algorithm}, {kind_of_pair(saved, layout)}"].append(found)
                print(f"{algorithm} saved on {saved[0]} ranks at stage {saved[1]['stage']}: done", flush=True)
        samples, generator = defaultdict(list), random.Random(arguments.seed)
        for number in range(arguments.samples):
            algorithm = generator.choice(("LARS", "LAMB", "NLAMB", "NNLAMB", "LANS"))
            saved, layout = random_layout(generator), random_layout(generator)
            found = campaign.resume(algorithm, saved, layout, generator.choice((1, 2)))
            precisions = " to ".join(x[1]["dtype"] for x in (saved, layout))
            samples[precisions].append(found)
            if found["error"] >= BOUND or not found["has_ratios"]:
                print(f"sample {number}: {algorithm} {saved} to {layout}: {found}", flush=True)
    finally:
        campaign.pool.close()
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    every = [r for rows in (pairs, samples) for found in rows.values() for r in found]
    diagonal = [r for name, found in pairs.items() if name.endswith("the same layout") for r in found]
    num_same = sum(r["has_bits"] for r in diagonal)
    is_good = num_same == len(diagonal) and all(r["error"] < BOUND and r["has_ratios"] for r in every)
    samples = dict(sorted(samples.items()))
    lines = [
        "World sizes 1 to 4 x ZeRO stages 0 to 3, fp32: saved at each, resumed at each.",
        "",
        *table(pairs),
        "",
        f"At the same layout {num_same} of {len(diagonal)} ended in the very bits of the run that went on.",
        "",
        f"{arguments.samples} pairs drawn at random (seed {arguments.seed}) over world size, stage, precision, optimizer and parameter "
        "offload, fp32 accumulation, accumulation steps, sub-group size, round-robin gradients, one or two param groups, and LARS, "
        "LAMB, NLAMB, NNLAMB, LANS; by precision:",
        "",
        *table(samples),
        "",
        f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, CPU ({platform.machine()}, {os.cpu_count()} cores), "
        f"{len(every)} resumes in {seconds:.0f} s.",
    ]
    print("\n".join(lines))
    if arguments.report:
        write_report(pathlib.Path(arguments.report), lines)
    return 0 if is_good else 1


MARK = "<!-- written by benchmarks/checkpoint_matrix.py -->"


def write_report(path: pathlib.Path, lines: list[str]) -> None:
    """Replaces what stands below the mark."""
    before = path.read_text().split(MARK)[0] if path.exists() else "# Checkpoints resumed at other layouts\n\n"
    path.write_text("\n".join([before + MARK, "", *lines, ""]))


if __name__ == "__main__":
    sys.exit(main())
