"""One fuzzed input through the product, in this process, and what came of it.

Outcomes that are as they should be:
    trained       steps were taken and everything that was written is whole
    refused       one error, raised by this project's own code, that names an entry or file that was changed
    left alone    a script's ds_config with another optimizer than ours: DeepSpeed answers for it
Findings:
    foreign       the error came out of a library     vague    it was no raise of ours, or names nothing that was changed
    traceback     the trainer ended in one            damaged  a file that is not whole
    wrong         another result than without damage  hang, died: see benchmarks/fuzz.py
"""

import contextlib
import gc
import io
import json
import linecache
import os
import pathlib
import random
import shutil
import time
import traceback
import types
import warnings

import torch

import largebatch
from largebatch.launch.data import sources
from largebatch.launch.supervise import exits
from largebatch.launch.trainer import main as train
from largebatch.launch.trainer.saving import step_folders
from largebatch.models.mlp import MLP
from largebatch.optim.registry import OPTIMIZERS
from support import fuzz_checkpoints, fuzz_configs
from support.trainer_runs import patched

GOOD = ("trained", "refused", "left alone")
ROOT = pathlib.Path(largebatch.__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) + os.sep for folder in ("plugin", "launch", "models", "ds_configs"))
NUM_STEPS = 2
SECONDS_OF_TRAINING = 1.0
LONGEST_MESSAGE = 2000


def join_world_of_one():
    """The process group that launch/train.py would make, kept for all cases of this process."""
    import deepspeed

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    if not torch.distributed.is_initialized():
        from largebatch.launch.supervise.launcher import free_port

        os.environ["MASTER_PORT"] = str(free_port())
        deepspeed.init_distributed("gloo", verbose=False)


def raising_line(error):
    """(path, text) of the line from which an error came."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "", ""
    last = frames[-1]
    # a multi-line raise is reported by its first line
    return last.filename, linecache.getline(last.filename, last.lineno).strip()


def is_raised_by_us(error):
    path, line = raising_line(error)
    return path.startswith(OURS), line.startswith(("raise ", "reject(", "parser.error("))


def judge_error(error, message, words):
    """(outcome, why) of one error with which an input was refused."""
    is_ours, is_raise = is_raised_by_us(error)
    path, line = raising_line(error)
    where = f"{path.removeprefix(str(ROOT) + os.sep)}: {line}"
    if not is_ours:
        return "foreign", where
    if not is_raise or "\n" in message or len(message) > LONGEST_MESSAGE or not message.strip():
        return "vague", where
    if not any(word and word.lower() in message.lower() for word in words):
        return "vague", f"names none of {sorted(set(words))}"
    return "refused", ""


DATA = {}
ENGINES = []
"""Data sets that were read, and engines of the case that is being run."""


@contextlib.contextmanager
def few_steps(seen):
    """Stops training as Ctrl-C does, after a few steps or a second; keeps what ``refuse`` is told and the data sets read."""
    open_phase, refuse, load = train.open_phase, train.refuse, sources.load_data
    started = []

    def open_limited(run, stage, reporter):
        loop, first_step = open_phase(run, stage, reporter)
        started.append(time.monotonic())
        ENGINES.append(loop.engine)
        train_one_step, ask = loop._train_one_step, loop._is_interrupted

        def one_step(step, batches):
            is_taken = train_one_step(step, batches)
            seen.num_steps += bool(is_taken)
            if seen.num_steps >= seen.limit:
                loop.interruption.is_requested = True
            return is_taken

        def is_interrupted(micro_step):
            seen.is_cut |= time.monotonic() - started[0] > seen.seconds
            seen.num_micro_steps += 1
            return ask(micro_step) or seen.is_cut

        loop._train_one_step, loop._is_interrupted = one_step, is_interrupted
        return loop, first_step

    def kept(error, **options):
        seen.errors.append(error)
        return refuse(error, **options)

    def load_once(name, folder, options):
        if name != "digits":
            return load(name, folder, options)
        if "digits" not in DATA:
            DATA["digits"] = load(name, folder, {})
        return DATA["digits"] if not options else load(name, folder, options)

    from largebatch.launch.trainer import classification

    with (
        patched(train, open_phase=open_limited, refuse=kept, leave=lambda code: code),
        patched(exits, leave=lambda code: code),
        patched(classification, load_data=load_once),
    ):
        yield


def run_main(arguments, limit=NUM_STEPS, seconds=SECONDS_OF_TRAINING):
    """launch/train.py on a command line: exit code, what it wrote, errors that it refused with, steps taken."""
    seen = types.SimpleNamespace(errors=[], num_steps=0, limit=limit, code=None, escaped=None)
    seen.seconds, seen.is_cut, seen.num_micro_steps = seconds, False, 0
    out, err = io.StringIO(), io.StringIO()
    with few_steps(seen), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            seen.code = train.main(arguments)
        except SystemExit as stop:
            seen.code = stop.code
        except BaseException as error:
            seen.escaped = error
    seen.out, seen.err = out.getvalue(), err.getvalue()
    return seen


def judge_run(seen, words, may_be_over=False):
    """(outcome, why, message)."""
    if seen.escaped is not None:
        path, line = raising_line(seen.escaped)
        text = f"{type(seen.escaped).__name__}: {seen.escaped}"
        return "traceback", f"{path.removeprefix(str(ROOT) + os.sep)}: {line}", text
    told = [line for line in seen.err.splitlines() if line.startswith("largebatch: error:")]
    if seen.code == 0:
        is_over = may_be_over and "test accuracy" in seen.out  # a resumed run that had taken all its steps
        if told or (seen.num_steps == 0 and not (seen.is_cut and seen.num_micro_steps) and not is_over):
            return "vague", f"exit code 0 after {seen.num_steps} steps", " ".join(told)
        return "trained", "", ""
    if not seen.errors:
        if "usage:" in seen.err and seen.code == 2:  # argparse
            return "refused", "", seen.err.splitlines()[-1]
        if told and seen.code == 1:
            return "refused", "", told[0]
        return "vague", f"exit code {seen.code}", seen.err[-500:]
    message = str(seen.errors[0])
    outcome, why = judge_error(seen.errors[0], message, words)
    if outcome == "refused" and (seen.code != 2 or len(told) != 1 or "Traceback (most recent call last)" in seen.err):
        return "vague", f"exit code {seen.code}, {len(told)} lines of error", seen.err[-500:]
    return outcome, why, f"{type(seen.errors[0]).__name__}: {message}"


def damages(folder):
    """What is not whole in a run's folder."""
    wrong = []
    for path in pathlib.Path(folder).rglob("*.partial"):
        wrong.append(f"{path.name} was left behind")
    checkpoints = os.path.join(folder, "checkpoints")
    for step in step_folders.steps_in(checkpoints):
        wrong += step_folders.faults(os.path.join(checkpoints, step_folders.name_of(step)))
    for path in pathlib.Path(folder).glob("ds_config*.json"):
        if not path.is_file():
            wrong.append(f"{path.name} is no file")
            continue
        try:
            json.loads(path.read_text(errors="replace"))
        except ValueError as error:
            wrong.append(f"{path.name}: {error}")
    metrics = pathlib.Path(folder) / "metrics.jsonl"
    for line in metrics.read_text(errors="replace").splitlines() if metrics.is_file() else []:
        try:
            json.loads(line)
        except ValueError as error:
            wrong.append(f"metrics.jsonl: {error}")
    return wrong


def trainer_case(rng, folder):
    base = rng.choice(sorted(TOYS))
    mutant = fuzz_configs.mutant_of(rng, TOYS[base], has_arguments=True)
    path = folder / "recipe.json"
    path.write_bytes(mutant.text)
    output = str(folder / "run")
    seen = run_main(["--deepspeed_config", str(path), "--output", output, *mutant.arguments])
    outcome, why, message = judge_run(seen, [*mutant.words, "recipe.json"])
    if outcome in ("trained", "refused"):
        wrong = damages(output) + ([] if path.read_bytes() == mutant.text else ["recipe.json was changed"])
        if wrong:
            outcome, why = "damaged", "; ".join(wrong)
    return base, mutant.kinds, outcome, why, message


TOYS = fuzz_configs.toy_recipes()
SCRIPTS = fuzz_configs.script_configs()


def script_case(rng, folder):
    """As a script of one's own would: register, initialize, a few steps."""
    base = rng.choice(sorted(SCRIPTS))
    mutant = fuzz_configs.mutant_of(rng, SCRIPTS[base], has_arguments=False)
    path = folder / "ds_config.json"
    path.write_bytes(mutant.text)
    try:
        config = json.loads(mutant.text)
    except (ValueError, RecursionError):
        config = None
    given = config if isinstance(config, dict) and rng.random() < 0.5 else str(path)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            train_a_script(given)
        except BaseException as error:
            outcome, why = judge_error(error, str(error), [*mutant.words, "ds_config.json"])
            message = f"{type(error).__name__}: {error}"
            if outcome != "refused" and is_left_to_deepspeed(config):
                outcome = "left alone"
            return base, mutant.kinds, outcome, why, message
    return base, mutant.kinds, "trained", "", ""


def is_left_to_deepspeed(config):
    from largebatch.launch.trainer.engines import check_optimizer_type

    if not isinstance(config, dict):
        return False
    if "optimizer" not in config:
        return True
    optimizer = config["optimizer"]
    name = optimizer.get("type") if isinstance(optimizer, dict) else None
    if not isinstance(name, str) or name.lower() in OPTIMIZERS:
        return False
    try:
        check_optimizer_type(name)
    except ValueError:
        return False
    return True


def train_a_script(config):
    import deepspeed

    torch.manual_seed(0)
    model = MLP()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    ENGINES.append(engine)
    dtype = next(engine.module.parameters()).dtype
    images = torch.rand(8, 1, 8, 8, dtype=dtype)
    labels = torch.arange(8) % 10
    for micro_step in range(NUM_STEPS * 2):
        engine.set_gradient_accumulation_boundary(micro_step % 2 == 1)
        loss = torch.nn.functional.cross_entropy(engine(images).float(), labels)
        engine.backward(loss)
        engine.step()


def checkpoint_case(rng, folder):
    """A run of a few steps, damaged, and resumed."""
    base = rng.choice(sorted(fuzz_checkpoints.RUNS))
    whole, arguments, figures = fuzz_checkpoints.trained_run(base, run_main)
    run = folder / "run"
    shutil.copytree(whole, run, symlinks=True)
    kinds, words, changed, may_differ = fuzz_checkpoints.damage(rng, run, whole)
    before, damaged = fuzz_checkpoints.contents(run), damages(run)
    seen = run_main([*arguments, *changed, "--output", str(run), "--resume"], limit=100, seconds=300)
    outcome, why, message = judge_run(seen, [*words, "run", "checkpoint"], may_be_over="--steps" in changed)
    if outcome == "trained":
        wrong = [damage for damage in damages(run) if damage not in damaged]
        if not may_differ and fuzz_checkpoints.figures_of(run) != figures:
            outcome, why = "wrong", f"{fuzz_checkpoints.figures_of(run)}, without damage {figures}"
        elif wrong:
            outcome, why = "damaged", "; ".join(wrong)
    elif outcome == "refused" and fuzz_checkpoints.contents(run) != before:
        outcome, why = "damaged", "a refused run has changed its folder"
    if any(run.rglob("executed")):
        outcome, why = "damaged", "a foreign pickle was executed"
    return base, kinds, outcome, why, message


PATHS = {"trainer": trainer_case, "script": script_case, "checkpoint": checkpoint_case}
SHARES = [42, 53, 5]
"""Per cent of the cases that take each path."""


def run_case(seed, number, folder):
    """The case of that number, in an empty folder: {"number", "path", "base", "kinds", "outcome", "why", "message", "seconds"}."""
    rng = random.Random(f"{seed}:{number}")
    path = rng.choices(list(PATHS), SHARES)[0]
    folder = pathlib.Path(folder)
    before, start, outcome = os.getcwd(), time.monotonic(), ""
    os.chdir(folder)
    try:
        base, kinds, outcome, why, message = PATHS[path](rng, folder)
    finally:
        os.chdir(before)
        for engine in ENGINES:
            engine.destroy()
        if ENGINES or outcome in ("foreign", "vague", "traceback"):
            ENGINES.clear()
            gc.collect()  # buffers of 2 GB each
    hidden = str(folder)
    return {
        "number": number,
        "path": path,
        "base": base,
        "kinds": kinds,
        "outcome": outcome,
        "why": why.replace(hidden, "."),
        "message": message.replace(hidden, ".")[:2000],
        "seconds": round(time.monotonic() - start, 3),
    }
