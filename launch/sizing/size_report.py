"""A plan in words, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from largebatch.planning import published
from largebatch.planning.choice import gigabytes
from largebatch.planning.training_time import duration

WORKERS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def text(plan: Any, output: str | None) -> str:
    """For people."""
    config, demand, choice = plan.config, plan.demand, plan.choice
    section, world = config["largebatch"], plan.cluster.world_size
    steps = demand.accumulation_steps(choice.micro_batch)
    params = config["optimizer"]["params"]
    lines = [
        f"{section['model']} on {section['data']}, {config['optimizer']['type']}, {demand.precision}",
        *plan.notes,
        "",
    ]
    lines.append(
        f"batch        {demand.global_batch:,} = micro-batch {choice.micro_batch} x {steps} accumulation steps x {world} GPUs "
        f"({choice.reason})"
    )
    lines.append(f"schedule     learning rate {params['lr']:.6g}, {schedule_words(config)}")
    per_epoch = f", {plan.num_samples / demand.global_batch:.4g} an epoch" if plan.num_samples else ""
    lines.append(f"steps        {plan.num_steps:,}{per_epoch}")
    lines.append(f"ZeRO         stage {choice.layout.stage}, offload {choice.layout.offload}")
    lines += ["", memory_text(plan), "", stages_text(plan), "", time_text(plan)]
    if output:
        lines += ["", f"wrote {output}; train it: deepspeed launch/train.py --deepspeed_config {output}"]
    return "\n".join(lines)


def schedule_words(config: dict[str, Any]) -> str:
    scheduler = config.get("scheduler")
    if not scheduler:
        return "no scheduler"
    params = scheduler["params"]
    unit = next((u for u in ("epochs", "steps") if params.get(f"warmup_{u}")), None)
    warmup = f"warm-up of {params[f'warmup_{unit}']:.4g} {unit}" if unit else "no warm-up"
    if unit and params.get("warmup_start_factor"):
        warmup += f" from {params['warmup_start_factor']:.3g} of it"
    return f"{warmup}, {scheduler['type']}"


def memory_text(plan: Any) -> str:
    choice, probe = plan.choice, plan.probe
    parts = [[name.replace("_", " "), gigabytes(n)] for name, n in choice.memory.device.items() if n]
    rows = [*parts, ["total", gigabytes(choice.memory.total)]]
    if choice.memory.host:
        rows.append(["in the machine's memory, per GPU", gigabytes(choice.memory.host_total)])
    runs = ", ".join(f"{n}: {gigabytes(peak)}" for n, peak in zip(probe.micro_batches, probe.peaks, strict=True))
    return (
        f"memory of a GPU at its worst moment, the {choice.memory.moment}; {plan.demand.num_parameters:,} parameters in "
        f"{len(plan.demand.layers)} layers\n{table(('part', 'size'), rows)}\n"
        f"  activations measured on {plan.probe_device} at micro-batch {runs}; {gigabytes(probe.bytes_per_sample)} a sample"
    )


def stages_text(plan: Any) -> str:
    rows = []
    for layout, memory, traffic, seconds in plan.stages:
        chosen = " <" if layout == plan.choice.layout else ""
        sent = ", ".join(
            f"{t.num_calls:,} {t.collective.replace('_', '-')} {gigabytes(t.num_bytes)}"
            for t in traffic
            if t.what != "small weights"
        )
        if layout.stage == 0 and plan.demand.precision != "fp32":
            sent += " (adds micro-steps up in 16 bits: refused by the trainer)"
        host = gigabytes(memory.host_total) if memory.host else "-"
        rows.append(
            [f"{layout.stage} {layout.offload}{chosen}", gigabytes(memory.total), host, duration(seconds), sent]
        )
    return f"ZeRO stages at this micro-batch\n{left_aligned(('stage, offload', 'GPU', 'host', 'network', 'collectives of a step'), rows)}"


def time_text(plan: Any) -> str:
    step = plan.step
    origin = "as given" if plan.is_throughput_given else f"measured on this machine's {plan.probe_device}"
    total = step.total * plan.num_steps
    return (
        f"time         {duration(step.total)} a step: {duration(step.compute)} computing at {plan.throughput:.4g} samples/s a GPU "
        f"({origin}), {duration(step.communication)} communicating"
        f"{f', {duration(step.hidden)} of it hidden' if step.hidden else ''}; efficiency {step.efficiency:.1%}\n"
        f"             {duration(total)} for {plan.num_steps:,} steps, without input, evaluation and checkpoints"
    )


def record(plan: Any) -> dict[str, Any]:
    """For programs: seconds and bytes."""
    choice, demand = plan.choice, plan.demand
    return {
        "recipe": plan.name,
        "notes": plan.notes,
        "global_batch": demand.global_batch,
        "micro_batch": choice.micro_batch,
        "accumulation_steps": demand.accumulation_steps(choice.micro_batch),
        "world_size": plan.cluster.world_size,
        "lr": plan.config["optimizer"]["params"]["lr"],
        "num_steps": plan.num_steps,
        "steps_per_epoch": plan.num_samples / demand.global_batch if plan.num_samples else None,
        "num_parameters": demand.num_parameters,
        "zero_stage": choice.layout.stage,
        "offload": choice.layout.offload,
        "memory": {"device": choice.memory.device, "host": choice.memory.host, "moment": choice.memory.moment},
        "stages": [
            {
                "zero_stage": layout.stage,
                "offload": layout.offload,
                "device_bytes": memory.total,
                "host_bytes": memory.host_total,
                "communication_seconds": seconds,
                "traffic": [vars(t) for t in traffic],
            }
            for layout, memory, traffic, seconds in plan.stages
        ],
        "probe": {"device": plan.probe_device, **vars(plan.probe)},
        "samples_per_second_per_gpu": plan.throughput,
        "step_seconds": {
            "compute": plan.step.compute,
            "communication": plan.step.communication,
            "hidden": plan.step.hidden,
        },
        "training_seconds": plan.step.total * plan.num_steps,
        "config": plan.config,
    }


EXTRAPOLATED = (
    "ResNet-50, 90 epochs, 2,048 KNL", "AlexNet, 100 epochs, 512 KNL", "ResNet-50, 90 epochs, 1,024 P100",
    "BERT 32K, 1,024 TPUv3",
)  # fmt: skip


def published_text() -> str:
    """The papers' systems: throughputs and their origin, published beside predicted times, and more workers."""
    rates = [[name, f"{rate.value:.4g}", rate.source] for name, rate in published.rates().items()]
    rows = []
    for c in published.comparisons():
        kind = "calibrates" if c.run.calibrates else f"{c.error:+.0%}"
        minutes = [f"{'~' if c.run.is_approximate else ''}{c.run.minutes:,.1f}", f"{c.predicted_minutes:,.1f}"]
        rows.append([c.run.name, *minutes, kind, f"{c.communication:.0%}", c.run.source])
    found = [
        "Throughput of a chip: images/s, for BERT TFLOP/s. One figure for each chip and model, the same in every row.",
        left_aligned(("chip, model", "rate", "source"), rates),
        "",
        "Published and predicted times in minutes; ~: a figure of the row is from memory. Nothing overlaps.",
        left_aligned(("training", "published", "predicted", "error", "network", "source"), rows),
        "",
        "The same training, batch unchanged, on more workers: minutes (share of the step that computes)",
    ]
    runs = [run for run in published.RUNS if run.name in EXTRAPOLATED]
    rows = []
    for run in runs:
        cells = [
            "-" if e.minutes is None else f"{e.minutes:,.1f} ({e.efficiency:.0%})"
            for e in published.extrapolate(run, WORKERS)
        ]
        overtaken = published.crossover(run)
        rows.append([run.name, *cells, f"{overtaken:,}" if overtaken else "-"])
    found.append(table(("training", *(f"{n:,}" for n in WORKERS), "network > compute at"), rows))
    return "\n".join(found)


def left_aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As table(), with the last column to the left."""
    lines = table(head, [[*row[:-1], ""] for row in rows]).splitlines()
    width = max(len(line.rstrip()) for line in lines[1:])
    start = lines[0].removesuffix(head[-1]).rstrip()
    tails = [head[-1], *(row[-1] for row in rows)]
    heads = [start, *(line.rstrip() for line in lines[1:])]
    return "\n".join(f"{front.ljust(width)}  {tail}" for front, tail in zip(heads, tails, strict=True))


def published_record() -> dict[str, Any]:
    return {
        "rates": {name: vars(rate) for name, rate in published.rates().items()},
        "runs": [
            {
                "name": c.run.name,
                "published_minutes": c.run.minutes,
                "predicted_minutes": c.predicted_minutes,
                "error": None if c.run.calibrates else c.error,
                "calibrates": c.run.calibrates,
                "is_approximate": c.run.is_approximate,
                "communication_share": c.communication,
                "source": c.run.source,
            }
            for c in published.comparisons()
        ],
        "extrapolations": {
            run.name: [vars(e) for e in published.extrapolate(run, WORKERS)]
            for run in published.RUNS
            if run.name in EXTRAPOLATED
        },
    }
