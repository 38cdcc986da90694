"""Trains the model and data set of a recipe: deepspeed launch/train.py --deepspeed_config ds_configs/<recipe>.json"""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import dataclass
from typing import Any

from largebatch.engine.initialization import init_distributed, set_timeout_of_all_groups
from largebatch.kernels.dispatch import UnavailableKernelsError
from largebatch.launch.data.image_folder import UnreadableImageError
from largebatch.launch.recipe.batch_division import is_micro_batch_open
from largebatch.launch.recipe.flags import parse_arguments
from largebatch.launch.recipe.reading import apply_overrides, read_recipe
from largebatch.launch.recipe.resolved_run import Phase, make_phases, resolve
from largebatch.launch.recipe.section import check_section, phase_recipes
from largebatch.launch.supervise import exits, run_lock
from largebatch.launch.supervise.exits import give_up, leave, refuse
from largebatch.launch.supervise.launcher import be_the_only_rank, is_launched
from largebatch.launch.supervise.signals import end_with_launcher
from largebatch.launch.trainer.engines import build_engine, check_ds_config, find_micro_batch, set_up_deepspeed
from largebatch.launch.trainer.loop import Outcome, TrainingLoop
from largebatch.launch.trainer.reporting import Reporter, discard_after, mean_of_last_evaluations, table
from largebatch.launch.trainer.run_folder import (
    check_run_folder,
    config_path,
    default_output,
    earlier_config,
    write_configs,
)
from largebatch.launch.trainer.saving import atomic, resuming
from largebatch.launch.trainer.saving.storage import broadcast, follow_storage
from largebatch.launch.trainer.step_reports import speed_name
from largebatch.launch.trainer.task import Task, build_task
from largebatch.optim.registry import OPTIMIZERS


@dataclass
class Run:
    """What a request comes to, before anything is trained."""

    folder: str
    phases: list[Phase]
    tasks: list[Task]
    is_micro_batch_automatic: list[bool]
    first_step: int
    rank: int
    world_size: int
    timeout: datetime.timedelta

    @property
    def metrics(self) -> str:
        return os.path.join(self.folder, "metrics.jsonl")

    @property
    def checkpoints(self) -> str:
        return os.path.join(self.folder, "checkpoints")


REQUEST_ERRORS = (ValueError, TypeError, OSError, AssertionError, RuntimeError)
"""What is wrong with a request, up to the first step of a phase."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: see supervise/exits.py."""
    arguments = parse_arguments(argv)
    reporter = None
    try:
        end_with_launcher()
        run = prepare(arguments)
        lock = run_lock.hold(run.folder) if run.rank == 0 else None
        if not run.first_step:
            write_configs(run.folder, run.phases, run.rank)
    except KeyboardInterrupt:
        return leave(130)
    except REQUEST_ERRORS as error:
        return refuse(error)
    for phase in run.phases:
        if run.first_step >= phase.end and phase is not run.phases[-1]:
            continue
        try:
            loop, first_step = open_phase(run, phase, reporter)
        except KeyboardInterrupt:  # from here on the training loop watches for it, and saves
            return leave(130)
        except REQUEST_ERRORS as error:
            return refuse(error)
        reporter = loop.reporter
        try:
            outcome = loop.run(first_step)
        except UnreadableImageError as error:
            return refuse(error, is_of_one_rank=True)
        except UnavailableKernelsError as error:  # the first step chooses them, once it sees the tensors
            reporter.close()
            return refuse(error)
        except atomic.CheckpointNotWrittenError as error:
            reporter.close()
            if run.rank == 0:
                print(f"largebatch: error: {error}", file=sys.stderr, flush=True)
            return leave(exits.NOT_SAVED)
        except RuntimeError as error:
            if not exits.is_lost_rank(error):
                raise
            return give_up(error, step=loop.last_reported_step, timeout=run.timeout)
        if not outcome.is_complete:
            break
        if phase is not run.phases[-1]:
            loop.engine.destroy()
    finish(run, loop, outcome)
    if lock is not None:
        lock.close()
    return leave(exits.DONE)


def prepare(arguments) -> Run:
    """Everything that can be wrong with the request is raised here, or while the first engine is built."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    recipe = apply_overrides(read_recipe(arguments.deepspeed_config), arguments)
    section = check_section(recipe)
    folder = arguments.output or default_output(arguments.deepspeed_config, section["seed"])
    recipes = phase_recipes(recipe)
    sections = [check_section(of_phase) for of_phase in recipes]
    tasks = [build_task(of_phase, arguments.data) for of_phase in sections]
    resolved_runs = [  # checked before anything is started
        resolve(of_phase, num_samples=task.num_samples, world_size=world_size, output=folder)
        for of_phase, task in zip(recipes, tasks, strict=True)
    ]
    check_run_folder(folder, arguments.resume)

    if not is_launched():
        be_the_only_rank()
    set_up_deepspeed()
    for resolved in resolved_runs:
        check_ds_config(resolved, world_size=world_size)
    timeout = exits.timeout_of(section)
    init_distributed(timeout=timeout)
    checkpoints = os.path.join(folder, "checkpoints")
    lines = [follow_storage(of_phase, checkpoints) for of_phase in recipes]
    for line in {*lines} - {""}:
        if rank == 0:
            print(f"largebatch: {line}", flush=True)
    automatic = [is_micro_batch_open(of_phase) for of_phase in recipes]
    # nodes may not see the first one's folder
    earlier_configs = [broadcast(earlier_config(folder, position)) for position in range(len(recipes))]
    for position, (of_phase, task) in enumerate(zip(recipes, tasks, strict=True)):
        earlier, layout = earlier_configs[position], {"world_size": world_size, "output": folder}
        is_found = automatic[position] and find_micro_batch(of_phase, task, earlier=earlier, **layout)
        if is_found or lines[position]:
            resolved_runs[position] = resolve(of_phase, num_samples=task.num_samples, **layout)
    first_step = 0
    if arguments.resume:
        first_step = step_to_resume(checkpoints, rank, is_required=arguments.resume != "auto")
    for earlier, resolved in zip(earlier_configs, resolved_runs, strict=True):
        if first_step:
            resuming.check_same_data(earlier, resolved.config)
    return Run(folder, make_phases(resolved_runs), tasks, automatic, first_step, rank, world_size, timeout)


def step_to_resume(folder: str, rank: int, *, is_required: bool) -> int:
    """The newest whole checkpoint's; says which newer ones are passed over. 0 where there is none, if none is required."""
    if not is_required and not resuming.has_any(folder):
        return 0
    step, damages = resuming.newest_whole(folder)
    if damages and rank == 0:
        print(
            f"largebatch: warning: damaged checkpoints are passed over ({'; '.join(damages)}); continuing from step {step}"
        )
    return step


def open_phase(run: Run, phase: Phase, reporter: Reporter | None) -> tuple[TrainingLoop, int]:
    """Everything up to a phase's first step, which may be another than 0 if the run is resumed.

    Args:
        reporter: of the phase before, None for the first.
    """
    task = run.tasks[phase.number]
    engine, batch_norm, monitor = build_engine(task, phase.resolved, world_size=run.world_size)
    set_timeout_of_all_groups(run.timeout)
    first_step = 0
    if run.first_step > phase.first_step:
        resuming.load(engine, run.checkpoints, run.first_step, rank=run.rank)
        first_step = run.first_step - phase.first_step
    elif phase.number:
        resuming.load_for_next_phase(engine, run.checkpoints, phase.first_step, rank=run.rank)
    if reporter is None:
        if run.first_step:  # what is there stays as it is until the checkpoint has been taken
            write_configs(run.folder, run.phases, run.rank)
        if run.rank == 0 and os.path.exists(run.metrics):  # of the run that is continued
            discard_after(run.metrics, run.first_step, is_last=run.first_step == run.phases[-1].end)
        reporter = Reporter(
            run.metrics,
            monitor,
            rank=run.rank,
            num_samples=phase.total_samples,
            samples_done=phase.first_sample + first_step * phase.resolved.global_batch,
            sample_name=task.sample_name,
        )
    reporter.follow(monitor)
    announce(reporter, engine, run, phase, first_step, batch_norm)
    loop = TrainingLoop(engine, phase, task, reporter, folder=run.checkpoints, rank=run.rank, world_size=run.world_size)
    return loop, first_step


def announce(reporter: Reporter, engine: Any, run: Run, phase: Phase, first_step: int, batch_norm: str) -> None:
    """What is in force, as a short table; the filled-in config is in the run's folder."""
    resolved = phase.resolved
    reporter.say(table(in_force(engine, run, phase, first_step)))
    if batch_norm:
        reporter.say(batch_norm)
        if run.is_micro_batch_automatic[phase.number] and "ghost_batch_size" not in resolved.section["batch_norm"]:
            reporter.say(
                f"warning: the micro-batch of {resolved.micro_batch} was chosen for this machine, and batch normalisation goes "
                "over it, so that another machine trains another network; set largebatch.batch_norm.ghost_batch_size"
            )
    if first_step:
        return
    if phase.number:
        reporter.event("phase", step=phase.first_step, phase=phase.number + 1, config=resolved.config)
        return
    excluded = getattr(engine.basic_optimizer, "excluded_layers", [])
    reporter.event(
        "start",
        config=resolved.config,
        world_size=run.world_size,
        device=str(engine.device.type),
        excluded={p.name: {"is_adapted": p.is_adapted, "is_decayed": p.is_decayed} for p in excluded},
    )


def in_force(engine: Any, run: Run, phase: Phase, first_step: int) -> dict[str, str]:
    """The rows of the table with which a phase begins."""
    resolved, config = phase.resolved, phase.resolved.config
    optimizer, params = config["optimizer"], config["optimizer"].get("params", {})
    schedule, clipping = config.get("scheduler", {}), engine.gradient_clipping()
    lengths = [f"{name} {value}" for name, value in schedule.get("params", {}).items()]
    rows = {
        "phase": f"{phase.number + 1} of {phase.num_phases}",
        "model": resolved.section["model"],
        "data": f"{run.tasks[phase.number].description}, seed {resolved.section['seed']}",
        "batch": f"{resolved.global_batch} = {resolved.micro_batch} x {resolved.accumulation_steps} accumulation steps x "
        f"{run.world_size} ranks on {engine.device.type}",
        "steps": f"{resolved.num_steps}{f' from step {first_step}' if first_step else ''}",
        "optimizer": f"{optimizer['type']} lr {params.get('lr')}, gradient clipping {f'at {clipping}' if clipping else 'off'}",
        "schedule": ", ".join([schedule.get("type", "constant"), *lengths]),
        "precision": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        "stage": f"ZeRO {engine.zero_optimization_stage()}",
        "kernels": params.get("kernels", "auto")
        if optimizer["type"].lower() in OPTIMIZERS
        else f"those of {optimizer['type']}",
        "ds_config": config_path(run.folder, phase.number),
    }
    if phase.num_phases == 1:
        del rows["phase"]
    return rows


def finish(run: Run, loop: TrainingLoop, outcome: Outcome) -> None:
    """The last lines of a run."""
    reporter = loop.reporter
    means = mean_of_last_evaluations(run.metrics) if run.rank == 0 else {}
    if outcome.is_complete:
        speed = {speed_name(loop.task): outcome.samples_per_second}
        reporter.event("end", step=outcome.step, **speed, **outcome.metrics, **means)
    reporter.close()
    if run.rank != 0:
        return
    if outcome.is_complete:
        print(
            f"{loop.task.summary(outcome.metrics)} after {outcome.step} steps, {outcome.samples_per_second:.0f} "
            f"{loop.task.sample_name}/s"
        )
        for name, value in means.items():
            print(f"{name}: {value:.4f}")
    else:
        print(f"interrupted after {outcome.step} of {loop.phase.total_steps} steps; continue with --resume")
    tensorboard = loop.resolved.config["tensorboard"]
    print(f"metrics: {run.metrics}")
    if tensorboard.get("enabled"):
        print(f"tensorboard: {os.path.join(tensorboard['output_path'], tensorboard['job_name'])}")
    print(f"checkpoint: {outcome.checkpoint}", flush=True)
