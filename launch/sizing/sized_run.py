"""A large batch on the GPUs at hand: its recipe, memory, communication and time, and the ds_config that trains it.

The arithmetic is in largebatch.planning; here the recipe is scaled and the model probed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from typing import Any

import torch

from largebatch.launch.data.options import NUM_SAMPLES, filled_options
from largebatch.launch.recipe.batch_division import micro_batch_candidates
from largebatch.launch.recipe.reading import read_recipe, set_precision
from largebatch.launch.recipe.resolved_run import resolve
from largebatch.launch.recipe.section import check_section, phase_recipes
from largebatch.launch.sizing import scaled_recipe
from largebatch.launch.sizing.probe_samples import model_and_loss
from largebatch.planning.activations import Probe, probe
from largebatch.planning.choice import Choice, Demand, choose, stage_table
from largebatch.planning.communication import Cluster, parse_network
from largebatch.planning.memory import OFFLOADS
from largebatch.planning.training_time import StepTime, num_steps, step_time

LARGE_FOR_A_CPU = 100_000_000
"""Parameters beyond which a CPU probes with smaller micro-batches."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """Everything that is printed.

    Attributes:
        config: the complete ds_config.
        notes: what was decided for the user, one line each.
        stages: rows of choice.stage_table.
        throughput: samples/s of one GPU.
        num_samples: of the training set; None where it is not known.
    """

    name: str
    config: dict[str, Any]
    notes: list[str]
    demand: Demand
    choice: Choice
    cluster: Cluster
    probe: Probe
    probe_device: str
    stages: list[tuple]
    step: StepTime
    throughput: float
    is_throughput_given: bool
    num_steps: int
    num_samples: int | None


def make(arguments: argparse.Namespace) -> Planned:
    """The plan that the command line asks for.

    Raises:
        ValueError, TypeError: something in the request or the recipe is wrong, or nothing fits.
    """
    if (arguments.recipe is None) == (arguments.model is None):
        raise ValueError("give either --recipe, or --model; `largebatch recipes` lists the recipes")
    for option in ("data_set", "optimizer"):
        if arguments.recipe is not None and getattr(arguments, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} goes with --model; {arguments.recipe} has its own")
    if arguments.network is not None and arguments.nodes == 1:
        raise ValueError("--network is between nodes and there is one; for the links inside it give --gpu-network")
    stage, cluster = zero_stage(arguments.zero_stage), cluster_of(arguments)
    name, recipe = scaled_recipe.read(arguments, read_recipe)
    recipe = phase_of(recipe, arguments.recipe_phase, name)
    if arguments.precision:
        set_precision(recipe, arguments.precision)
    recipe["largebatch"] = check_section(recipe)
    if arguments.epochs is not None:
        recipe["largebatch"] |= {"epochs": arguments.epochs, "steps": None}
    section = recipe["largebatch"]
    num_samples = samples_of(section, arguments.num_samples)

    notes = [] if arguments.recipe else [f"starting from the recipe {name}, the nearest in batch"]
    asked = arguments.global_batch or recipe["train_batch_size"]
    rates = scaled_recipe.planned_rates(recipe, rule=arguments.rule, global_batch=asked, num_samples=num_samples)
    global_batch, note = scaled_recipe.divisible_batch(recipe, asked, cluster.world_size)
    notes += [note] if note else []
    notes.append(f"learning rate: {rates.reason}" if rates else f"learning rate and warm-up: as in {name}")
    planned = scaled_recipe.planned_recipe(recipe, global_batch=global_batch, rates=rates, num_samples=num_samples)

    precision = scaled_recipe.precision_of(planned)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, loss = model_and_loss(planned["largebatch"], precision, device)
    layers = tuple(p.numel() for p in model.parameters() if p.requires_grad)
    is_slow = device == "cpu" and sum(layers) > LARGE_FOR_A_CPU
    measured = probe(model, loss, micro_batches=(1, 2) if is_slow else (2, 4), device=device)
    optimizer, state_bytes = scaled_recipe.optimizer_of(planned)
    demand = Demand(
        layers, optimizer, precision, measured.activations, global_batch, cluster.world_size, state_bytes=state_bytes
    )
    candidates = micro_batch_candidates(planned, cluster.world_size)
    if arguments.micro_batch and arguments.micro_batch not in candidates:
        near = [m for m in candidates if m <= arguments.micro_batch][-1:] + [
            m for m in candidates if m > arguments.micro_batch
        ][:1]
        raise ValueError(
            f"--micro-batch {arguments.micro_batch} does not divide {global_batch:,} samples over {cluster.world_size} ranks as the "
            f"recipe needs it; the nearest that do: {' and '.join(map(str, near))}"
        )
    memory = arguments.gpu_memory
    if memory is None and device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    choice = choose(
        demand,
        candidates,
        gpu_memory=memory,
        stage=stage,
        offload=arguments.offload,
        micro_batch=arguments.micro_batch,
    )
    config = complete(planned, choice, num_samples, cluster.world_size)
    stages = stage_table(demand, choice.micro_batch, cluster)
    throughput = arguments.throughput or measured.samples_per_second(choice.micro_batch)
    communication = next(seconds for layout, _, _, seconds in stages if layout == choice.layout)
    step = step_time(
        global_batch=global_batch,
        world_size=cluster.world_size,
        samples_per_second=throughput,
        communication=communication,
        overlap=arguments.overlap,
        accumulation_steps=demand.accumulation_steps(choice.micro_batch),
    )
    steps = planned["largebatch"]["steps"] or num_steps(num_samples, global_batch, planned["largebatch"]["epochs"])
    return Planned(
        name, config, notes, demand, choice, cluster, measured, device, stages, step, throughput,
        arguments.throughput is not None, int(steps), num_samples,
    )  # fmt: skip


def phase_of(recipe: dict[str, Any], phase: int | None, name: str) -> dict[str, Any]:
    """One phase of a recipe, or the recipe itself where it has none."""
    phases = phase_recipes(recipe)
    if recipe.get("largebatch", {}).get("phases") is None:
        if phase is not None:
            raise ValueError(f"--recipe-phase is {phase}, and {name} has no phases; leave it out")
        return copy.deepcopy(recipe)
    if phase is None or phase > len(phases):
        raise ValueError(
            f"{name} has {len(phases)} phases, each a plan of its own; give --recipe-phase 1 to {len(phases)}"
        )
    return phases[phase - 1]


def zero_stage(text: str) -> int | None:
    """None for "auto"."""
    if text == "auto":
        return None
    if text not in ("0", "1", "2", "3"):
        raise ValueError(f"--zero-stage is {text!r}; expected 0, 1, 2, 3 or auto")
    return int(text)


def samples_of(section: dict[str, Any], given: int | None) -> int | None:
    """Samples of the training set; None where neither the data set nor the user says, and the length is in steps."""
    data = section["data"]
    if given is not None:
        return given
    if data in NUM_SAMPLES:
        return NUM_SAMPLES[data]
    if data == "synthetic":
        return filled_options(data, section["data_options"])["num_samples"]
    if section["steps"] is None:
        raise ValueError(f"the length is in epochs and the size of {data!r} is not known; give --num-samples")
    return None


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """The nodes and networks of the command line, else those of this machine."""
    gpus = arguments.gpus or torch.cuda.device_count()
    if not gpus:
        raise ValueError("this machine has no GPU; say with --gpus how many a node will have")
    between = parse_network(arguments.network or "100gbe") if arguments.nodes > 1 else None
    return Cluster(arguments.nodes, gpus, parse_network(arguments.gpu_network), between)


def complete(planned: dict[str, Any], choice: Choice, num_samples: int | None, world_size: int) -> dict[str, Any]:
    """The ds_config with nothing left open, as the trainer fills it in."""
    planned = copy.deepcopy(planned)
    planned["train_micro_batch_size_per_gpu"] = choice.micro_batch
    zero = planned.setdefault("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param", "reduce_bucket_size"):
        zero.pop(key, None)
    zero["stage"] = choice.layout.stage
    if choice.layout.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if choice.layout.offload == OFFLOADS[2]:
        zero["offload_param"] = {"device": "cpu"}
    if "bucket" in choice.memory.device and choice.memory.device["bucket"]:
        zero["reduce_bucket_size"] = choice.layout.bucket_elements
    config = resolve(
        planned, num_samples=num_samples or planned["train_batch_size"], world_size=world_size, output="."
    ).config
    del config["tensorboard"]  # names the run's folder
    defaults = check_section({"largebatch": {k: planned["largebatch"][k] for k in ("model", "data")} | {"steps": 1}})
    kept = ("model", "data", "epochs", "steps")
    section = {
        k: v
        for k, v in config["largebatch"].items()
        if (k in kept and v is not None) or v != defaults[k] and k not in kept
    }
    return config | {"largebatch": section}
