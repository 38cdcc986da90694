"""What a run tells: progress bar, metrics file (JSON lines), TensorBoard through DeepSpeed's monitor. Rank 0 only."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tqdm import tqdm


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
        if self.is_writer:
            self.file = open(path, "a", encoding="utf-8")
            self.num_samples, self.samples_done = num_samples, samples_done
            self.sample_name = sample_name
        self.bar: tqdm | None = None

    def start_bar(self) -> None:
        """From here on progress is shown."""
        if self.is_writer:
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
        """Writes {tag: value} to every monitor that the ds_config enables; the x axis is samples."""
        if self.is_writer:
            self.monitor.write_events([(tag, float(value), num_samples) for tag, value in values.items()])

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
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


def discard_after(path: str, step: int) -> None:
    """Drops the lines of the metrics file that a resumed run will write again: those of later steps."""
    with open(path, encoding="utf-8") as file:
        lines = file.readlines()
    kept = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while writing it
            continue
        if record["event"] not in ("end", "interrupted") and record.get("step", 0) <= step:
            kept.append(line)
    temporary = f"{path}.partial"
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
