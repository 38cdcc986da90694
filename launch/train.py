"""Trains the model and data set of a recipe: deepspeed launch/train.py --deepspeed_config ds_configs/<recipe>.json"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from largebatch.launch import checkpoints
from largebatch.launch.arguments import apply_overrides, parse_arguments, read_recipe
from largebatch.launch.parameter_groups import parameter_groups
from largebatch.launch.recipe_section import check_section
from largebatch.launch.reporting import Reporter, discard_after
from largebatch.launch.run_plan import Plan, make_plan
from largebatch.launch.task import Task, build_task
from largebatch.launch.training_loop import Outcome, TrainingLoop, speed_name


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line that says what is wrong with the request."""
    arguments = parse_arguments(argv)
    try:
        run_folder, loop, first_step = build(arguments)
    except KeyboardInterrupt:  # from here on the training loop watches for it, and saves
        leave()
        return 130
    except (ValueError, TypeError, OSError, AssertionError) as error:
        if os.environ.get("LARGEBATCH_TRACEBACK") == "1":
            raise
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"largebatch: error: {error}", file=sys.stderr, flush=True)
        leave()
        return 2
    outcome = loop.run(first_step)
    finish(loop, outcome, run_folder)
    leave()
    return 0


def build(arguments) -> tuple[str, TrainingLoop, int]:
    """Everything up to the first step. Whatever is wrong with the request is raised here."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    recipe = apply_overrides(read_recipe(arguments.deepspeed_config), arguments)
    section = check_section(recipe)
    run_folder = arguments.output or default_output(arguments.deepspeed_config, section["seed"])
    task = build_task(section, arguments.data)
    plan = make_plan(recipe, num_samples=task.num_samples, world_size=world_size, output=run_folder)
    torch.manual_seed(section["seed"])
    model = task.build_model()
    check_run_folder(run_folder, arguments.resume)

    deepspeed = import_deepspeed()
    check_optimizer_type(plan.config["optimizer"]["type"])
    deepspeed.init_distributed(verbose=False)
    prepare_run_folder(run_folder, plan, rank)
    with contextlib.redirect_stdout(None):  # BF16_Optimizer prints memory figures whatever the log level
        groups = parameter_groups(model, section["no_weight_decay"])
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=plan.config)
    folder = os.path.join(run_folder, "checkpoints")
    first_step = checkpoints.load(engine, folder) if arguments.resume else 0
    metrics = os.path.join(run_folder, "metrics.jsonl")
    if arguments.resume and rank == 0 and os.path.exists(metrics):
        discard_after(metrics, first_step)
    reporter = Reporter(
        metrics,
        engine.monitor,
        rank=rank,
        num_samples=plan.num_steps * plan.global_batch,
        samples_done=first_step * plan.global_batch,
        sample_name=task.sample_name,
    )
    announce(reporter, engine, plan, task, world_size, first_step)
    return (
        run_folder,
        TrainingLoop(engine, plan, task, reporter, folder=folder, rank=rank, world_size=world_size),
        first_step,
    )


def import_deepspeed() -> Any:
    """DeepSpeed with largebatch registered, without its chatter, and with gloo alone on the CPU."""
    # torch 2.15 deprecates collectives under the names by which DeepSpeed 0.19.8 calls them
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch)\..*")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(
                max(
                    1,
                    len(os.sched_getaffinity(0))
                    // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1)),
                )
            )
    import deepspeed
    from deepspeed.utils import logger

    import largebatch

    logger.setLevel(logging.WARNING)
    largebatch.register()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # DeepSpeed's shared-memory all-reduce needs a compiler and leaves 66 MB per rank in /dev/shm after each run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_optimizer_type(name: Any) -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    from largebatch.config import nearest_hint
    from largebatch.register import OPTIMIZERS

    if not isinstance(name, str) or (name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name)):
        known = [cls.__name__ for cls in OPTIMIZERS.values()] + ["SGD", "Adam", "AdamW", "Adagrad"]
        hint = nearest_hint(name, known) or nearest_hint(str(name).upper(), known)
        raise ValueError(f"optimizer.type is {name!r}; expected {', '.join(known)}, or a class of torch.optim{hint}")


def default_output(config_path: str, seed: int) -> str:
    name = os.path.splitext(os.path.basename(config_path))[0]
    return os.path.join("runs", f"{name}_seed{seed}")


def check_run_folder(run_folder: str, is_resumed: bool) -> None:
    has_results = os.path.exists(os.path.join(run_folder, "metrics.jsonl"))
    if has_results and not is_resumed:
        raise ValueError(f"{run_folder!r} already holds a run; continue it with --resume, or choose another --output")
    if is_resumed and not os.path.isdir(run_folder):
        raise ValueError(f"--resume: {run_folder!r} does not exist; name the run to continue with --output")


def prepare_run_folder(run_folder: str, plan: Plan, rank: int) -> None:
    if rank == 0:
        os.makedirs(run_folder, exist_ok=True)
        with open(os.path.join(run_folder, "ds_config.json"), "w", encoding="utf-8") as file:
            json.dump(plan.config, file, indent=2)
            file.write("\n")
    dist.barrier()


def announce(reporter: Reporter, engine: Any, plan: Plan, task: Task, world_size: int, first_step: int) -> None:
    """One line with everything in force, and the filled-in config."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    optimizer = plan.config["optimizer"]
    clipping = engine.gradient_clipping()
    reporter.say(
        f"{task.description}, {optimizer['type']} lr "
        f"{optimizer.get('params', {}).get('lr')}, global batch {plan.global_batch} = {plan.micro_batch} x "
        f"{plan.accumulation_steps} accumulation steps x {world_size} ranks on {engine.device.type}, {plan.num_steps} steps"
        f"{f' from step {first_step}' if first_step else ''}, {precision}, ZeRO stage {engine.zero_optimization_stage()}, "
        f"gradient clipping {f'at {clipping}' if clipping else 'off'}, seed {plan.section['seed']}"
    )
    if not first_step:
        reporter.say(f"ds_config with every 'auto' filled in: {json.dumps(plan.config)}")
        excluded = getattr(engine.basic_optimizer, "excluded_layers", [])
        reporter.event(
            "start",
            config=plan.config,
            world_size=world_size,
            device=str(engine.device.type),
            excluded={p.name: {"is_adapted": p.is_adapted, "is_decayed": p.is_decayed} for p in excluded},
        )


def finish(loop: TrainingLoop, outcome: Outcome, run_folder: str) -> None:
    """The last lines of a run."""
    reporter = loop.reporter
    if outcome.is_complete:
        speed = {speed_name(loop.task): outcome.samples_per_second}
        reporter.event("end", step=outcome.step, **speed, **outcome.figures)
    reporter.close()
    if loop.rank != 0:
        return
    if outcome.is_complete:
        print(
            f"{loop.task.summary(outcome.figures)} after {outcome.step} steps, {outcome.samples_per_second:.0f} "
            f"{loop.task.sample_name}/s"
        )
    else:
        print(f"interrupted after {outcome.step} of {loop.plan.num_steps} steps; continue with --resume")
    tensorboard = loop.plan.config["tensorboard"]
    print(f"metrics: {os.path.join(run_folder, 'metrics.jsonl')}")
    if tensorboard.get("enabled"):
        print(f"tensorboard: {os.path.join(tensorboard['output_path'], tensorboard['job_name'])}")
    print(f"checkpoint: {outcome.checkpoint}", flush=True)


def leave() -> None:
    """Takes the process group down; without it some runs abort while the interpreter ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
