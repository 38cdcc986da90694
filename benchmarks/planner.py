"""Does a run take what `largebatch plan` says? Memory of real DeepSpeed engines on this machine's CPU beside the prediction.

    python benchmarks/planner.py --report benchmarks/reports/planner_cpu_<date>.md

Each case runs in processes of its own. "tensors" is the peak of live tensors and torch's allocator in the second step, what
the planner predicts; "RSS" is how much the process grew, which adds the allocator's slack, gloo's buffers and the libraries'
own memory.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from harness import preamble  # noqa: E402

from largebatch.planning.memory import Layout, memory  # noqa: E402
from support import engine_memory  # noqa: E402
from support.rank_pool import RankPool  # noqa: E402

MICRO_BATCH, ACCUMULATION = 16, 4

CASES = [
    *[("lenet", "bf16", stage, ranks, "LAMB") for stage in (1, 2, 3) for ranks in (1, 2)],
    *[("lenet", "fp32", stage, 2, "LARS") for stage in (0, 1, 2, 3)],
    *[("torchvision:resnet18", "fp32", stage, 2, "LAMB") for stage in (1, 3)],
]
"""Model, type, ZeRO stage, ranks, optimizer."""


class ResidentMemory(threading.Thread):
    """Samples the process's resident bytes until stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first = self.largest = self.now()
        self.is_stopped = False

    @staticmethod
    def now() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def run(self):
        while not self.is_stopped:
            self.largest = max(self.largest, self.now())
            time.sleep(0.002)


def watched_run(model, stage, precision, **options):
    """engine_memory.measured on a rank, with the growth of the process beside it."""
    resident = ResidentMemory()
    resident.start()
    found = engine_memory.measured(model, stage, precision, **options)
    resident.is_stopped = True
    return found | {"rss": resident.largest - resident.first}


def row(model: str, precision: str, stage: int, ranks: int, optimizer: str, probes: dict) -> tuple[list[str], float]:
    """The cells of a case, and the relative error of the prediction."""
    pool = RankPool()
    if (model, precision) not in probes:
        probes[model, precision] = pool.run(1, engine_memory.probed, model, precision)[0]
    layers = [p.numel() for p in engine_memory.fresh_model(model).parameters()]
    layout = Layout(stage, precision, ranks, "none", sum(layers))
    outcomes = pool.run(
        ranks, watched_run, model, stage, precision, optimizer=optimizer, micro_batch=MICRO_BATCH,
        zero={"reduce_bucket_size": layout.bucket_elements} if stage else {}, accumulation=ACCUMULATION,
    )  # fmt: skip
    pool.close()
    activations = probes[model, precision].activations(MICRO_BATCH)
    predicted = memory(
        layers, layout, optimizer=optimizer.lower(), activations=activations, accumulation_steps=ACCUMULATION
    )
    measured = max(o["peak"] for o in outcomes)
    error = predicted.total / measured - 1
    sizes = [f"{n / 1e6:.1f}" for n in (predicted.total, measured)]
    rss = max(o["rss"] for o in outcomes) / 1e6
    steps = f"{outcomes[0]['steps']} of 2"
    return [
        model,
        precision,
        optimizer,
        str(stage),
        str(ranks),
        *sizes,
        f"{error:+.1%}",
        predicted.moment,
        f"{rss:.0f}",
        steps,
    ], error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=pathlib.Path, help="write the Markdown there")
    arguments = parser.parse_args()
    head = [
        "model",
        "type",
        "optimizer",
        "stage",
        "ranks",
        "predicted, MB",
        "tensors, MB",
        "error",
        "worst moment",
        "RSS, MB",
        "steps",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    print("\n".join(lines), flush=True)
    probes: dict = {}
    errors = []
    for case in CASES:
        cells, error = row(*case, probes)
        errors.append(abs(error))
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    summary = f"Largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}, over {len(errors)} cases."
    print(summary)
    if arguments.report:
        text = preamble("Planned and real memory", "cpu", "python benchmarks/planner.py")
        text += [
            f"Micro-batch {MICRO_BATCH}, {ACCUMULATION} accumulation steps, one bucket; lenet at 1x28x28, resnet18 at 3x64x64. Peaks of one "
            "rank, the larger of two. Tensors: live ones and the allocator's peak above them in the second step.",
            "", *lines, "", summary, "",
        ]  # fmt: skip
        arguments.report.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
