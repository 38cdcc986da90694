"""Trains the model and data set of a recipe: deepspeed launch/train.py --deepspeed_config ds_configs/<recipe>.json"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from largebatch.launch.arguments import apply_overrides, parse_arguments, read_recipe
from largebatch.launch.checkpoints import loading, saving
from largebatch.launch.engines import (
    build_engine,
    check_optimizer_type,
    find_micro_batch,
    import_deepspeed,
)
from largebatch.launch.inputs.image_folder import UnreadableImageError
from largebatch.launch.recipe_section import check_section, stage_recipes
from largebatch.launch.reporting import Reporter, discard_after, mean_of_last_evaluations
from largebatch.launch.run_plan import Stage, is_micro_batch_open, make_plan, make_stages
from largebatch.launch.task import Task, build_task
from largebatch.launch.training_loop import Outcome, TrainingLoop, speed_name


@dataclass
class Run:
    """What a request comes to, before anything is trained."""

    folder: str
    stages: list[Stage]
    tasks: list[Task]
    is_micro_batch_automatic: list[bool]
    first_step: int
    rank: int
    world_size: int

    @property
    def metrics(self) -> str:
        return os.path.join(self.folder, "metrics.jsonl")

    @property
    def checkpoints(self) -> str:
        return os.path.join(self.folder, "checkpoints")


REQUEST_ERRORS = (ValueError, TypeError, OSError, AssertionError, RuntimeError)
"""What is wrong with a request, up to the first step of a stage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if the last checkpoint could not be written; or 2 after one line that says what is wrong
    with the request.
    """
    arguments = parse_arguments(argv)
    reporter = None
    try:
        run = prepare(arguments)
        write_configs(run)
    except KeyboardInterrupt:
        return leave(130)
    except REQUEST_ERRORS as error:
        return refuse(error)
    for stage in run.stages:
        if run.first_step >= stage.end and stage is not run.stages[-1]:
            continue
        try:
            loop, first_step = open_stage(run, stage, reporter)
        except KeyboardInterrupt:  # from here on the training loop watches for it, and saves
            return leave(130)
        except REQUEST_ERRORS as error:
            return refuse(error)
        try:
            outcome = loop.run(first_step)
        except UnreadableImageError as error:
            return refuse(error, is_of_one_rank=True)
        except saving.CheckpointNotWrittenError as error:
            loop.reporter.close()
            if run.rank == 0:
                print(f"largebatch: error: {error}", file=sys.stderr, flush=True)
            return leave(1)
        reporter = loop.reporter
        if not outcome.is_complete:
            break
        if stage is not run.stages[-1]:
            loop.engine.destroy()
    finish(run, loop, outcome)
    return leave(0)


def refuse(error: Exception, *, is_of_one_rank: bool = False) -> int:
    """One line, from one rank if all have the same to say."""
    if os.environ.get("LARGEBATCH_TRACEBACK") == "1":
        raise error
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or is_of_one_rank or isinstance(error, RuntimeError):
        print(f"largebatch: error: {error}", file=sys.stderr, flush=True)
    return leave(2)


def prepare(arguments) -> Run:
    """Everything that can be wrong with the request is raised here, or while the first engine is built."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    recipe = apply_overrides(read_recipe(arguments.deepspeed_config), arguments)
    section = check_section(recipe)
    folder = arguments.output or default_output(arguments.deepspeed_config, section["seed"])
    recipes = stage_recipes(recipe)
    sections = [check_section(of_stage) for of_stage in recipes]
    tasks = [build_task(of_stage, arguments.data) for of_stage in sections]
    lengths = [task.num_samples for task in tasks]
    for of_stage, num_samples in zip(recipes, lengths, strict=True):  # checked before anything is started
        make_plan(of_stage, num_samples=num_samples, world_size=world_size, output=folder)
    check_run_folder(folder, arguments.resume)

    deepspeed = import_deepspeed()
    check_optimizer_type(recipe["optimizer"]["type"])
    deepspeed.init_distributed(verbose=False)
    automatic = [is_micro_batch_open(of_stage) for of_stage in recipes]
    plans = []
    for position, (of_stage, task) in enumerate(zip(recipes, tasks, strict=True)):
        if automatic[position]:
            find_micro_batch(
                of_stage, task, earlier=earlier_config(folder, position), world_size=world_size, output=folder
            )
        plans.append(make_plan(of_stage, num_samples=task.num_samples, world_size=world_size, output=folder))
    first_step = step_to_resume(os.path.join(folder, "checkpoints"), rank) if arguments.resume else 0
    return Run(folder, make_stages(plans), tasks, automatic, first_step, rank, world_size)


def step_to_resume(folder: str, rank: int) -> int:
    """The newest whole checkpoint's; says which newer ones are passed over."""
    step, damages = loading.newest_whole(folder)
    if damages and rank == 0:
        print(
            f"largebatch: warning: damaged checkpoints are passed over ({'; '.join(damages)}); continuing from step {step}"
        )
    return step


def open_stage(run: Run, stage: Stage, reporter: Reporter | None) -> tuple[TrainingLoop, int]:
    """Everything up to a stage's first step, which may be another than 0 if the run is resumed.

    Args:
        reporter: of the stage before, None for the first.
    """
    task = run.tasks[stage.number]
    engine, batch_norm, monitor = build_engine(task, stage.plan, world_size=run.world_size)
    first_step = 0
    if run.first_step > stage.first_step:
        loading.load(engine, run.checkpoints, run.first_step, rank=run.rank)
        first_step = run.first_step - stage.first_step
    elif stage.number:
        loading.load_for_next_stage(engine, run.checkpoints, stage.first_step, rank=run.rank)
    if reporter is None:
        if run.first_step and run.rank == 0 and os.path.exists(run.metrics):
            discard_after(run.metrics, run.first_step)
        reporter = Reporter(
            run.metrics,
            monitor,
            rank=run.rank,
            num_samples=stage.total_samples,
            samples_done=stage.first_sample + first_step * stage.plan.global_batch,
            sample_name=task.sample_name,
        )
    reporter.follow(monitor)
    announce(reporter, engine, run, stage, first_step, batch_norm)
    loop = TrainingLoop(engine, stage, task, reporter, folder=run.checkpoints, rank=run.rank, world_size=run.world_size)
    return loop, first_step


def earlier_config(folder: str, position: int) -> dict[str, Any] | None:
    """The filled-in config with which a run that is to be resumed has trained a stage."""
    try:
        with open(os.path.join(folder, config_name(position)), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def config_name(position: int) -> str:
    return "ds_config.json" if position == 0 else f"ds_config_stage{position + 1}.json"


def default_output(config_path: str, seed: int) -> str:
    name = os.path.splitext(os.path.basename(config_path))[0]
    return os.path.join("runs", f"{name}_seed{seed}")


def check_run_folder(run_folder: str, is_resumed: bool) -> None:
    has_results = os.path.exists(os.path.join(run_folder, "metrics.jsonl"))
    if has_results and not is_resumed:
        raise ValueError(f"{run_folder!r} already holds a run; continue it with --resume, or choose another --output")
    if is_resumed and not os.path.isdir(run_folder):
        raise ValueError(f"--resume: {run_folder!r} does not exist; name the run to continue with --output")


def write_configs(run: Run) -> None:
    if run.rank == 0:
        os.makedirs(run.folder, exist_ok=True)
        for stage in run.stages:
            with open(os.path.join(run.folder, config_name(stage.number)), "w", encoding="utf-8") as file:
                json.dump(stage.plan.config, file, indent=2)
                file.write("\n")
    dist.barrier()


def announce(reporter: Reporter, engine: Any, run: Run, stage: Stage, first_step: int, batch_norm: str) -> None:
    """Everything in force, and the filled-in config."""
    plan, task = stage.plan, run.tasks[stage.number]
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    optimizer = plan.config["optimizer"]
    clipping = engine.gradient_clipping()
    is_automatic = run.is_micro_batch_automatic[stage.number]
    reporter.say(
        f"{f'stage {stage.number + 1} of {stage.num_stages}: ' if stage.num_stages > 1 else ''}"
        f"{task.description}, {optimizer['type']} lr "
        f"{optimizer.get('params', {}).get('lr')}, global batch {plan.global_batch} = {plan.micro_batch} x "
        f"{plan.accumulation_steps} accumulation steps x {run.world_size} ranks on {engine.device.type}, {plan.num_steps} "
        f"steps{f' from step {first_step}' if first_step else ''}, {precision}, ZeRO stage "
        f"{engine.zero_optimization_stage()}, gradient clipping {f'at {clipping}' if clipping else 'off'}, seed "
        f"{plan.section['seed']}"
    )
    if batch_norm:
        reporter.say(batch_norm)
        if is_automatic and not plan.section["batch_norm"]:
            reporter.say(
                f"warning: the micro-batch of {plan.micro_batch} was chosen for this machine, and batch normalisation goes "
                "over it, so that another machine trains another network; set largebatch.batch_norm.span"
            )
    if first_step:
        return
    if stage.number:
        reporter.event("stage", step=stage.first_step, stage=stage.number + 1, config=plan.config)
        return
    reporter.say(f"ds_config with every 'auto' filled in: {json.dumps(plan.config)}")
    excluded = getattr(engine.basic_optimizer, "excluded_layers", [])
    reporter.event(
        "start",
        config=plan.config,
        world_size=run.world_size,
        device=str(engine.device.type),
        excluded={p.name: {"is_adapted": p.is_adapted, "is_decayed": p.is_decayed} for p in excluded},
    )


def finish(run: Run, loop: TrainingLoop, outcome: Outcome) -> None:
    """The last lines of a run."""
    reporter = loop.reporter
    means = mean_of_last_evaluations(run.metrics) if run.rank == 0 else {}
    if outcome.is_complete:
        speed = {speed_name(loop.task): outcome.samples_per_second}
        reporter.event("end", step=outcome.step, **speed, **outcome.figures, **means)
    reporter.close()
    if run.rank != 0:
        return
    if outcome.is_complete:
        print(
            f"{loop.task.summary(outcome.figures)} after {outcome.step} steps, {outcome.samples_per_second:.0f} "
            f"{loop.task.sample_name}/s"
        )
        for name, value in means.items():
            print(f"{name}: {value:.4f}")
    else:
        print(f"interrupted after {outcome.step} of {loop.stage.total_steps} steps; continue with --resume")
    tensorboard = loop.plan.config["tensorboard"]
    print(f"metrics: {run.metrics}")
    if tensorboard.get("enabled"):
        print(f"tensorboard: {os.path.join(tensorboard['output_path'], tensorboard['job_name'])}")
    print(f"checkpoint: {outcome.checkpoint}", flush=True)


def leave(exit_code: int) -> int:
    """Takes the process group down; without it some runs abort while the interpreter ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
