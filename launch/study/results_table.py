"""Prints a Markdown table of finished runs: python -m largebatch.launch.study.results_table RUN_FOLDER [RUN_FOLDER ...]

Runs that differ in nothing but the seed share a row, with mean and sample standard deviation.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from typing import Any

from largebatch.launch.study.results import events_of, mean_and_spread, metrics_of, speed_of, trained_with


@dataclass(frozen=True)
class Run:
    """What metrics.jsonl says of a run that came to its end."""

    config: dict[str, Any]
    num_steps: int
    metric: str
    value: float
    samples_per_second: float

    @property
    def row_key(self) -> str:
        """Everything in force except the seed and the folder."""
        # 20 epochs and 20.0 epochs are one setting
        config = json.loads(
            json.dumps(self.config), parse_float=lambda text: int(f) if (f := float(text)).is_integer() else f
        )
        config["largebatch"] = trained_with(config["largebatch"])
        config["largebatch"].pop("seed")
        config.pop("tensorboard", None)
        return json.dumps(config, sort_keys=True)


def read_run(folder: str) -> Run | None:
    """The run in a folder; None if it has not ended."""
    events = events_of(folder)
    start = next((e for e in events if e["event"] == "start"), None)
    end = next((e for e in events if e["event"] == "end"), None)
    if start is None or end is None:
        return None
    metric, value = next(iter(metrics_of(end).items()))
    return Run(start["config"], end["step"], metric, value, speed_of(end))


def table(runs: list[Run]) -> str:
    """One row per optimizer, batch and setting, in the order of the runs."""
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.row_key, []).append(run)
    lines = [
        f"| optimizer | lr | global batch | steps | test {runs[0].metric} | runs | samples/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in rows.values():
        first = group[0]
        optimizer = first.config["optimizer"]
        speed = statistics.median(run.samples_per_second for run in group)
        lines.append(
            f"| {optimizer['type']} | {optimizer['params'].get('lr'):.4g} | {first.config['train_batch_size']:,} "
            f"| {first.num_steps} | {mean_and_spread([run.value for run in group])} | {len(group)} | {speed:,.0f} |"
        )
    return "\n".join(lines)


def main(folders: list[str]) -> int:
    runs = {folder: read_run(folder) for folder in folders}
    unfinished = [folder for folder, run in runs.items() if run is None]
    if unfinished or not runs:
        print(f"largebatch: error: no finished run in {', '.join(unfinished) or 'the arguments'}", file=sys.stderr)
        return 2
    print(table([run for run in runs.values() if run is not None]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
