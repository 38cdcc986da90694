"""The papers' systems through the planner's time model: what it predicts for them, and where communication overtakes.

Each chip gets one throughput per model, from a measurement elsewhere or from one published run, and keeps it in every other
run: batch and network are all that a prediction may change. A run that a throughput was taken from is marked "calibrates"
and is no prediction. No overlap of communication with computation is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from largebatch.planning.communication import NETWORKS, Cluster, Traffic, communication_seconds
from largebatch.planning.training_time import StepTime, num_steps, step_time

IMAGENET = 1_281_167
RESNET50, ALEXNET, BERT_LARGE = 25_557_032, 60_965_224, 336_226_108
"""Parameters; gradients travel in fp32."""

BERT_LAYERS, BERT_WIDTH = 24, 1024


def bert_work(sequence_length: int) -> float:
    """TFLOP of a BERT-large sequence, forward and backward: 6 per parameter and token, and 12 s^2 h per layer of attention."""
    flop = 6 * BERT_LARGE * sequence_length + 12 * BERT_LAYERS * BERT_WIDTH * sequence_length**2
    return flop / 1e12


@dataclass(frozen=True)
class Phase:
    """Attributes: work: of a sample, in the unit of the throughput (images, TFLOP)."""

    num_steps: int
    global_batch: int
    work: float = 1.0


def imagenet(epochs: float, global_batch: int) -> tuple[Phase, ...]:
    return (Phase(num_steps(IMAGENET, global_batch, epochs), global_batch),)


def bert(*phases: tuple[int, int, int]) -> tuple[Phase, ...]:
    return tuple(Phase(steps, batch, bert_work(length)) for steps, batch, length in phases)


@dataclass(frozen=True)
class Run:
    """A published training.

    Attributes:
        rate: key of the throughput, chip and model.
        minutes: published.
        is_approximate: whether a figure of the row was not read on its page.
    """

    name: str
    rate: str
    num_parameters: int
    phases: tuple[Phase, ...]
    cluster: Cluster
    minutes: float
    source: str
    calibrates: bool = False
    is_approximate: bool = False


@dataclass(frozen=True)
class Rate:
    """A chip's throughput at a model. Attributes: value: samples/s or TFLOP/s of one chip; source: where it was measured."""

    value: float
    source: str


def nodes(count: int, network: str, gpus: int = 1, inside: str = "nvlink1") -> Cluster:
    return Cluster(count, gpus, NETWORKS[inside], NETWORKS[network])


MINUTES_PAPER = "arXiv:1709.05011"
BERT_PAPER = "arXiv:1904.00962 v1, Table 1"

RUNS: tuple[Run, ...] = (
    Run("ResNet-50, 90 epochs, 512 KNL", "KNL ResNet-50", RESNET50, imagenet(90, 32768), nodes(512, "omni-path"), 60,
        f"{MINUTES_PAPER} v1, \"one hour\"", calibrates=True),
    Run("ResNet-50, 90 epochs, 2,048 KNL", "KNL ResNet-50", RESNET50, imagenet(90, 32768), nodes(2048, "omni-path"), 20,
        MINUTES_PAPER),
    Run("ResNet-50, 64 epochs, 2,048 KNL", "KNL ResNet-50", RESNET50, imagenet(64, 32768), nodes(2048, "omni-path"), 14,
        MINUTES_PAPER),
    Run("AlexNet, 100 epochs, 512 KNL", "KNL AlexNet", ALEXNET, imagenet(100, 32768), nodes(512, "omni-path"), 24,
        f"{MINUTES_PAPER} v1"),
    Run("ResNet-50, 90 epochs, 1,024 Skylake", "Skylake ResNet-50", RESNET50, imagenet(90, 32768), nodes(1024, "omni-path"), 48,
        f"{MINUTES_PAPER}, an earlier version", calibrates=True),
    Run("ResNet-50, 90 epochs, 1,600 Skylake", "Skylake ResNet-50", RESNET50, imagenet(90, 32000), nodes(1600, "omni-path"), 31,
        f"{MINUTES_PAPER}, an earlier version; the number of CPUs and the batch are not read", is_approximate=True),
    Run("AlexNet, 100 epochs, 1,024 Skylake", "Skylake AlexNet", ALEXNET, imagenet(100, 32768), nodes(1024, "omni-path"), 11,
        MINUTES_PAPER),
    Run("ResNet-50, 90 epochs, 8 P100", "P100 ResNet-50", RESNET50, imagenet(90, 256), nodes(1, "50gbe", 8), 29 * 60,
        "arXiv:1706.02677, as 1709.05011 quotes it"),
    Run("ResNet-50, 90 epochs, 256 P100", "P100 ResNet-50", RESNET50, imagenet(90, 8192), nodes(32, "50gbe", 8), 65,
        "arXiv:1706.02677; its figure for 256 images a step, 29 h, is the row above"),
    Run("ResNet-50, 90 epochs, 256 P100 (IBM)", "P100 ResNet-50", RESNET50, imagenet(90, 8192), nodes(64, "edr-infiniband", 4), 48,
        "arXiv:1711.00705; the network is not read", is_approximate=True),
    Run("ResNet-50, 90 epochs, 1,024 P100", "P100 ResNet-50", RESNET50, imagenet(90, 32768),
        nodes(128, "2x-fdr-infiniband", 8, "pcie3"), 15, "arXiv:1711.04325; the network is not read", is_approximate=True),
    Run("BERT 512, 16 TPUv3", "TPUv3 BERT", BERT_LARGE, bert((900_000, 512, 128), (100_000, 512, 512)), nodes(16, "tpu-v3"),
        82.8 * 60, BERT_PAPER, calibrates=True),
    Run("BERT 1K, 32 TPUv3", "TPUv3 BERT", BERT_LARGE, bert((450_000, 1024, 128), (50_000, 1024, 512)), nodes(32, "tpu-v3"),
        43.2 * 60, BERT_PAPER),
    Run("BERT 2K, 64 TPUv3", "TPUv3 BERT", BERT_LARGE, bert((225_000, 2048, 128), (25_000, 2048, 512)), nodes(64, "tpu-v3"),
        21.4 * 60, BERT_PAPER),
    Run("BERT 4K, 128 TPUv3", "TPUv3 BERT", BERT_LARGE, bert((112_500, 4096, 128), (12_500, 4096, 512)), nodes(128, "tpu-v3"),
        693.6, BERT_PAPER),
    Run("BERT 8K, 256 TPUv3", "TPUv3 BERT", BERT_LARGE, bert((56_250, 8192, 128), (6_250, 8192, 512)), nodes(256, "tpu-v3"),
        390.5, BERT_PAPER),
    Run("BERT 16K, 512 TPUv3", "TPUv3 BERT", BERT_LARGE, bert((28_125, 16384, 128), (3_125, 16384, 512)), nodes(512, "tpu-v3"),
        200.0, BERT_PAPER),
    Run("BERT 32K, 1,024 TPUv3", "TPUv3 BERT", BERT_LARGE, bert((14_063, 32768, 128), (1_562, 32768, 512)),
        nodes(1024, "tpu-v3"), 101.2, BERT_PAPER),
    Run("BERT 64K/32K, 1,024 TPUv3", "TPUv3 BERT", BERT_LARGE, bert((7_037, 65536, 128), (1_562, 32768, 512)),
        nodes(1024, "tpu-v3"), 76.19, BERT_PAPER),
    Run("ResNet-50 LAMB, 3,519 steps, 128 TPUv3", "TPUv3 ResNet-50", RESNET50, (Phase(3519, 32768),), nodes(128, "tpu-v3"),
        998.5 / 60, "github.com/fastalgo/imagenet_resnet50_lamb, log.out, 01:36:59 to 01:53:37 with compilation and checkpoints"),
)  # fmt: skip

MEASURED: dict[str, Rate] = {
    "KNL AlexNet": Rate(444, "one Xeon Phi 7250, batch 256: github.com/intel/caffe issue 132"),
    "P100 ResNet-50": Rate(
        195,
        "one P100, batch 32, synthetic data: TensorFlow's benchmarks of May 2017 (docs_src/performance/benchmarks.md)",
    ),
    "TPUv3 ResNet-50": Rate(1_050_000 / 1024, "1.05 million images/s on 1,024 chips: arXiv:1811.06992, abstract"),
}
"""Throughputs from outside the runs above. That of TPUv3 contains the communication of its own system."""

DERIVED = {"Skylake AlexNet": ("KNL AlexNet", "Skylake ResNet-50", "KNL ResNet-50")}
"""No measurement was found: the first times the second over the third, that is, the chips' ratio at ResNet-50."""


def step_traffic(run: Run) -> list[Traffic]:
    """The all-reduce of all gradients, in one piece."""
    return [Traffic("all_reduce", "gradients", 4 * run.num_parameters, 1)]


def phase_step(run: Run, phase: Phase, rate: float) -> StepTime:
    return step_time(
        global_batch=phase.global_batch,
        world_size=run.cluster.world_size,
        samples_per_second=rate / phase.work,
        communication=communication_seconds(step_traffic(run), run.cluster),
    )


def training_seconds(run: Run, rate: float) -> float:
    """Seconds of all steps at a throughput (samples/s or TFLOP/s of one chip)."""
    return sum(phase.num_steps * phase_step(run, phase, rate).total for phase in run.phases)


def calibrated_rate(run: Run) -> Rate:
    """The throughput with which the model gives a run's published time."""
    communication = communication_seconds(step_traffic(run), run.cluster) * sum(p.num_steps for p in run.phases)
    work = sum(p.num_steps * p.global_batch * p.work for p in run.phases)
    return Rate(work / run.cluster.world_size / (run.minutes * 60 - communication), f"from the run {run.name!r}")


def rates() -> dict[str, Rate]:
    """Every chip's throughput at every model, and where it is from."""
    found = MEASURED | {run.rate: calibrated_rate(run) for run in RUNS if run.calibrates}
    for key, (base, over, under) in DERIVED.items():
        value = found[base].value * found[over].value / found[under].value
        found[key] = Rate(value, f"{base} times {over} over {under}")
    return found


@dataclass(frozen=True)
class Comparison:
    """Attributes: predicted_minutes: by the model; error: relative, to the published time; communication: share of the step."""

    run: Run
    predicted_minutes: float
    communication: float
    error: float = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "error", self.predicted_minutes / self.run.minutes - 1)


def comparisons() -> list[Comparison]:
    """Each published run beside the model's time."""
    known = rates()
    found = []
    for run in RUNS:
        seconds = training_seconds(run, known[run.rate].value)
        waiting = communication_seconds(step_traffic(run), run.cluster) * sum(p.num_steps for p in run.phases)
        found.append(Comparison(run, seconds / 60, waiting / seconds))
    return found


@dataclass(frozen=True)
class Extrapolation:
    """Attributes: workers, minutes, efficiency: share of the step that computes; None where a worker has less than a sample."""

    workers: int
    minutes: float | None
    efficiency: float | None


def extrapolate(run: Run, workers: Sequence[int]) -> list[Extrapolation]:
    """The same training, batch unchanged, on other numbers of nodes of the same kind."""
    rate = rates()[run.rate].value
    found = []
    for count in workers:
        gpus = run.cluster.gpus_per_node
        cluster = Cluster(max(1, count // gpus), gpus, run.cluster.inside, run.cluster.between)
        if any(phase.global_batch < cluster.world_size for phase in run.phases):
            found.append(Extrapolation(count, None, None))
            continue
        moved = Run(run.name, run.rate, run.num_parameters, run.phases, cluster, run.minutes, run.source)
        seconds = training_seconds(moved, rate)
        compute = sum(p.num_steps * phase_step(moved, p, rate).compute for p in run.phases)
        found.append(Extrapolation(count, seconds / 60, compute / seconds))
    return found


def crossover(run: Run, limit: int = 2**20) -> int | None:
    """The smallest number of workers, a power of two times a node, at which communication takes longer than computation.

    None if that needs workers with less than one sample, or more than ``limit``.
    """
    count = run.cluster.gpus_per_node
    while count <= limit:
        (found,) = extrapolate(run, [count])
        if found.efficiency is None:
            return None
        if found.efficiency < 0.5:
            return count
        count *= 2
    return None
