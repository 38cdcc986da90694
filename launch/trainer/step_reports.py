"""What is told of a step: its line in the metrics file, the scalars, the words behind the bar."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from largebatch.launch.data.transfers import Download
from largebatch.launch.trainer.reporting import Reporter
from largebatch.launch.trainer.task import Task
from largebatch.telemetry import LayerStats, merged


@dataclass
class TakenStep:
    """A step that was enqueued on the device, to be reported once the next one has been, too.

    Attributes:
        agreed: [3 + ranks] fp64, summed over the ranks: loss, requests to stop, seconds of the step before, then each rank's
            own time.
        fields: of its line in the metrics file, known at once.
        layers: of its layers, and their metrics on their way; None if they are not wanted.
    """

    step: int
    agreed: Download
    fields: dict[str, Any]
    layers: list[tuple[LayerStats, Download]] | None


@dataclass
class Speed:
    """Samples trained and seconds spent on them, evaluations and checkpoints aside.

    The first step does not count once there is a second: it may have compiled kernels.
    """

    seconds: float = 0.0
    samples: int = 0
    num_steps: int = 0
    last: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        self.last = time.perf_counter()

    def count(self, num_samples: int) -> float:
        """Seconds since the last call or restart."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        if self.num_steps == 1:
            self.seconds, self.samples = 0.0, 0
        self.num_steps += 1
        self.seconds += seconds
        self.samples += num_samples
        return seconds

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0


def report_step(
    reporter: Reporter,
    taken: TakenStep,
    *,
    loss: float,
    step: int,
    total_steps: int,
    epoch: float,
    num_samples: int,
    speed: dict[str, float],
) -> None:
    """Tells of a step that the device has finished.

    Args:
        loss: the mean over the global batch. step, num_samples: of the whole run so far. epoch: of the phase.
        speed: {what it is called: samples a second}.
    """
    reporter.status(loss=f"{loss:.4f}", lr=f"{taken.fields['lr']:.4g}", step=f"{step}/{total_steps}")
    reporter.event("step", step=step, epoch=epoch, loss=loss, **taken.fields, **speed)
    scalars = {"loss": loss, "lr": taken.fields["lr"], **speed}
    if "loss_scale" in taken.fields:
        scalars["loss_scale"] = taken.fields["loss_scale"]
    tagged = {f"Train/{name}": value for name, value in scalars.items()}
    if taken.layers is not None:
        layers = merged(stats._replace(figures=metrics.values()) for stats, metrics in taken.layers)
        reporter.event("layers", step=step, layers=layers)
        for name, metrics in layers.items():
            tagged |= {
                f"{tag_of(metric)}/{name}": value for metric, value in metrics.items() if metric != "weight_decay"
            }
        over_layers = {
            f"Layers/{key}": [f[key] for f in layers.values() if key in f] for key in ("trust_ratio", "local_lr")
        }
        reporter.histograms(over_layers, num_samples)
    reporter.scalars(tagged, num_samples)


def tag_of(metric: str) -> str:
    """ "trust_ratio" -> "TrustRatio", "local_lr" -> "LocalLR"."""
    return "".join(word.upper() if word == "lr" else word.capitalize() for word in metric.split("_"))


def speed_name(task: Task) -> str:
    return "images_per_second" if task.sample_name == "images" else "samples_per_second"
