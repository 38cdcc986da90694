"""Plots the trust ratio of every layer over training from a run's metrics file.

python benchmarks/plot_trust_ratios.py runs/<run>/metrics.jsonl OUT.png
"""

from __future__ import annotations

import json
import sys


def main(metrics: str, path: str) -> int:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(metrics, encoding="utf-8") as file:
        events = [json.loads(line) for line in file]
    config = next(e["config"] for e in events if e["event"] == "start")
    records = [e for e in events if e["event"] == "layers"]
    steps = [e["step"] for e in records]
    figure, axis = plt.subplots(figsize=(9, 4.2))
    for name in records[0]["layers"]:
        style = "--" if name.endswith("bias") else "-"
        axis.plot(steps, [e["layers"][name]["trust_ratio"] for e in records], style, label=name)
    section = config["largebatch"]
    title = (
        f"{section['model']} on {section['data']}, {config['optimizer']['type']}, batch {config['train_batch_size']:,}"
    )
    axis.set(title=title, xlabel="step", ylabel="trust ratio", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(ncols=2, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
