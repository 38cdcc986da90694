"""Pictures of a study: accuracy against batch, accuracy against steps, and every layer's local learning rate.

The last of them for any run: python -m largebatch.launch.study.plots RUN_FOLDER OUT.png

Needs matplotlib, the extra ``plots``. The layers' figures are those of arXiv:1708.03888, section 4 (Figure 2 and Table 2
there show norms and their ratio by layer): trust ratio, local learning rate and the two norms, from a run's telemetry.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from typing import Any

from largebatch.launch.study.results import Row, by_cell, events_of

PANELS = (("trust_ratio", "trust ratio"), ("local_lr", "local learning rate"),
          ("weight_norm", "weight norm"), ("direction_norm", "norm of gradient (LARS) or update (LAMB)"))  # fmt: skip
"""Figure in the telemetry and its name on the axis."""


def pyplot() -> Any:
    """matplotlib without a display.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError(
            "plots need matplotlib, which is not installed; pip install 'largebatch[plots]', or give --no-plots"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure: Any, path: str) -> str:
    """Writes a PNG with a palette, a third of the size of one without."""
    from PIL import Image  # comes with matplotlib

    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot().close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128)
    small.save(path, optimize=True)
    return path


def scale_values(axis: Any, values: list[float]) -> None:
    """A logit axis for shares of which some are near 1: .97 and .99 lie as far apart there as .5 and .75."""
    if all(0 < value < 1 for value in values) and max(values) > 0.9:
        axis.set_yscale("logit")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if 1e-3 < value < 1 - 1e-4 else "")
        axis.yaxis.set_minor_formatter(lambda value, _: "")


def plot_value_against_batch(rows: list[Row], path: str) -> str:
    """Mean of each cell, with the sample standard deviation as a bar, and every run as a point."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2))
    cells = by_cell(rows)
    batches = sorted({row.batch for row in rows})
    for number, optimizer in enumerate(dict.fromkeys(row.optimizer for row in rows)):
        groups = [
            (batch, [r.value for r in cells[optimizer, batch]]) for batch in batches if (optimizer, batch) in cells
        ]
        means = [statistics.mean(values) for _, values in groups]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in groups]
        color = f"C{number}"
        axis.errorbar([b for b, _ in groups], means, spreads, color=color, marker="o", capsize=3, label=optimizer)
        axis.scatter([b for b, values in groups for _ in values], [v for _, values in groups for v in values], 8, color)
    scale_values(axis, [row.value for row in rows])
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axis.set_xlabel("global batch")
    axis.set_ylabel(f"test {rows[0].metric}")
    axis.set_title(f"{rows[0].model} on {rows[0].data}, {max(len(g) for g in cells.values())} seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    return save(figure, path)


def plot_value_against_steps(rows: list[Row], study_folder: str, path: str) -> str | None:
    """A panel per batch, a line per run, a colour per optimizer; of the runs whose folders are there, None for none."""
    rows = [row for row in rows if has_events(study_folder, row)]
    if not rows:
        return None
    plt = pyplot()
    batches = sorted({row.batch for row in rows})
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    figure, axes = plt.subplots(1, len(batches), figsize=(3.6 * len(batches) + 0.6, 3.8), sharey=True, squeeze=False)
    scale_values(axes[0][0], [row.value for row in rows])  # for all: the axis is shared
    for axis, batch in zip(axes[0], batches, strict=True):
        for row in (row for row in rows if row.batch == batch):
            events = [e for e in events_of(os.path.join(study_folder, row.folder)) if e["event"] == "evaluation"]
            steps, values = [e["step"] for e in events], [e[row.metric] for e in events]
            axis.plot(steps, values, color=f"C{optimizers.index(row.optimizer)}", linewidth=1, marker=".", markersize=3)
        axis.set(title=f"batch {batch:,}", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"test {rows[0].metric}")
    lines = [plt.Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(optimizers)]
    axes[0][-1].legend(handles=lines, fontsize="small")
    return save(figure, path)


def plot_layers(folder: str, path: str) -> str | None:
    """Trust ratio, local learning rate and both norms of every layer over the steps of one run; None if it has no telemetry."""
    events = events_of(folder)
    records = [e for e in events if e["event"] == "layers"]
    if not records:
        return None
    plt = pyplot()
    config = next(e["config"] for e in events if e["event"] == "start")
    steps, names = [e["step"] for e in records], list(records[0]["layers"])
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for axis, (key, label) in zip(axes.flat, PANELS, strict=True):
        for name in names:
            values = [e["layers"][name][key] for e in records]
            # a log axis has no place for the zero norm of a fresh bias
            values = [value if value > 0 else math.nan for value in values]
            axis.plot(steps, values, "--" if name.endswith("bias") else "-", linewidth=1, label=name)
        axis.set(ylabel=label, yscale="log")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    if len(names) <= 24:
        axes[0][1].legend(fontsize="x-small", ncols=2)
    section = config["largebatch"]
    figure.suptitle(
        f"{section['model']} on {section['data']}, {config['optimizer']['type']}, batch {config['train_batch_size']:,}, "
        f"seed {section['seed']}"
    )
    return save(figure, path)


def has_events(study_folder: str, row: Row) -> bool:
    return os.path.exists(os.path.join(study_folder, row.folder, "metrics.jsonl"))


def draw_all(rows: list[Row], study_folder: str) -> list[str]:
    """The paths of the pictures: two of the whole study, one of the layers for each optimizer at its largest batch.

    Runs that are known from a CSV alone are in the first.
    """
    paths: list[str | None] = [
        plot_value_against_batch(rows, os.path.join(study_folder, "value_by_batch.png")),
        plot_value_against_steps(rows, study_folder, os.path.join(study_folder, "value_by_step.png")),
    ]
    here = [row for row in rows if has_events(study_folder, row)]
    for optimizer in dict.fromkeys(row.optimizer for row in here):
        row = max((r for r in here if r.optimizer == optimizer), key=lambda r: (r.batch, -r.seed))
        name = f"layers_{row.folder}.png"
        paths.append(plot_layers(os.path.join(study_folder, row.folder), os.path.join(study_folder, name)))
    return [path for path in paths if path is not None]


def main(folder: str, path: str) -> int:
    if plot_layers(folder, path) is None:
        print(f"largebatch: error: no events 'layers' in {os.path.join(folder, 'metrics.jsonl')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
