"""What a run tells: progress bar, metrics file (JSON lines), TensorBoard through DeepSpeed's monitor. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

NUM_AVERAGED = 5
SECONDS_BETWEEN_SCALARS = 1.0
"""Monitors write to the disk at every call."""


class Reporter:
    """Writes nothing on ranks other than 0.

    Args:
        path: of the metrics file; appended to. Each line is one JSON object with a key "event".
        monitor: ``engine.monitor``.
        num_samples: of the whole run, for the time left; samples_done: those before a resume.
        sample_name: "images" or what else they are called.
    """

    def __init__(
        self, path: str, monitor: Any, *, rank: int, num_samples: int, samples_done: int, sample_name: str = "images"
    ):
        self.is_writer = rank == 0
        self.monitor = monitor
        self.waiting: list[tuple[str, float, int]] = []
        self.last_written = time.monotonic()
        if self.is_writer:
            try:
                self.file = open(path, "a", encoding="utf-8")
            except OSError as error:
                raise ValueError(f"the metrics file {path!r} cannot be written: {error}") from None
            self.num_samples, self.samples_done = num_samples, samples_done
            self.sample_name = sample_name
        self.bar: tqdm | None = None

    def follow(self, monitor: Any) -> None:
        """From here on scalars go to this monitor."""
        if self.is_writer and monitor is not self.monitor:
            self.write_scalars()
            self.monitor = monitor

    def start_bar(self) -> None:
        """From here on progress is shown."""
        if self.is_writer and self.bar is None:
            is_terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=self.num_samples,
                initial=self.samples_done,
                unit="img" if self.sample_name == "images" else self.sample_name,
                unit_scale=True,
                mininterval=0.5 if is_terminal else 20.0,
                dynamic_ncols=is_terminal,
                smoothing=0.05,
            )

    def event(self, event: str, **fields: Any) -> None:
        """Adds a line to the metrics file."""
        if self.is_writer:
            self.file.write(json.dumps({"event": event} | fields) + "\n")
            self.file.flush()

    def scalars(self, values: dict[str, float], num_samples: int) -> None:
        """For every monitor that the ds_config enables, about once a second; the x axis is samples."""
        if self.is_writer:
            self.waiting += [(tag, float(value), num_samples) for tag, value in values.items()]
            if time.monotonic() - self.last_written > SECONDS_BETWEEN_SCALARS:
                self.write_scalars()

    def histograms(self, values: dict[str, list[float]], num_samples: int) -> None:
        """For TensorBoard, if the ds_config enables it: no other monitor takes them. Zeros, NaN and inf have no logarithm.

        Args:
            values: tag -> numbers that the host has already; their decimal logarithms are shown.
        """
        board = getattr(self.monitor, "tb_monitor", None)
        writer = None if board is None else board.summary_writer
        if not self.is_writer or writer is None:
            return
        for tag, numbers in values.items():
            logarithms = [math.log10(number) for number in numbers if 0 < number < math.inf]
            if logarithms:
                writer.add_histogram(f"{tag}_log10", np.array(logarithms), num_samples)

    def write_scalars(self) -> None:
        self.monitor.write_events(self.waiting)
        self.waiting = []
        self.last_written = time.monotonic()

    def advance(self, num_samples: int) -> None:
        if self.bar is not None:
            self.bar.update(num_samples)

    def status(self, **values: Any) -> None:
        """Shown behind the progress bar."""
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)

    def say(self, text: str) -> None:
        """One line on standard output, above the bar."""
        if self.is_writer:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self.is_writer:
            if self.bar is not None:
                self.bar.close()
            self.write_scalars()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


def table(rows: dict[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows.items())


def discard_after(path: str, step: int, *, is_last: bool = False) -> None:
    """Drops the lines of the metrics file that a resumed run will write again: those of later steps.

    Args:
        is_last: of the run: its evaluation, too, is done again.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError as error:
        raise ValueError(f"--resume: {path!r} cannot be read: {error}") from None
    kept, num_damaged = [], 0
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step", 0), int) or "event" not in record:
            num_damaged += 1  # one is the last line of a run that was killed while writing it
            continue
        is_repeated = (
            record["event"] in ("end", "interrupted")
            or (record["event"] == "start" and not step)
            or (record["event"] in ("phase", "stage") and record.get("step") == step)
            or (record["event"] == "evaluation" and record.get("step") == step and is_last)
        )
        if not is_repeated and record.get("step", 0) <= step:
            kept.append(line)
    if num_damaged > 1:
        print(f"largebatch: warning: {path!r} has {num_damaged} damaged lines, which are left out", file=sys.stderr)
    temporary = f"{path}.partial"
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def mean_of_last_evaluations(path: str) -> dict[str, float]:
    """{"<metric>_mean_of_last_5": mean} of the main metric, as the LARS paper reports accuracies; empty for fewer than 5.

    Args:
        path: of a metrics file. With the recipes' one evaluation an epoch these are the last five epochs.
    """
    with open(path, encoding="utf-8") as file:
        events = [json.loads(line) for line in file]
    last = [event for event in events if event["event"] == "evaluation"][-NUM_AVERAGED:]
    if len(last) < NUM_AVERAGED:
        return {}
    name = next(name for name in last[0] if name not in ("event", "step", "epoch"))
    if not all(name in event for event in last):
        return {}
    return {f"{name}_mean_of_last_{NUM_AVERAGED}": sum(event[name] for event in last) / NUM_AVERAGED}
