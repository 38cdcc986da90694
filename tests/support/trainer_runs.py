"""The whole trainer inside a rank of the pool: what launch/train.py does, without its own process group."""

import contextlib
import functools
import os

import torch
import torch.distributed as dist

from largebatch.launch.recipe.flags import parse_arguments
from largebatch.launch.trainer import engines
from largebatch.launch.trainer import main as train
from largebatch.launch.trainer.classification import Classification


@contextlib.contextmanager
def patched(owner, **attributes):
    originals = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def launched(on_own_nodes=False):
    """The variables that the launcher sets; each rank on a node of its own or all on one."""
    values = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    if on_own_nodes:
        values |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_trainer(arguments, stop_after=None, on_own_nodes=False):
    """Trains to the end, or until a stop is asked for in step ``stop_after``; the weights and buffers of rank 0's model."""
    with launched(on_own_nodes):
        run = train.prepare(parse_arguments([str(a) for a in arguments]))
        train.write_configs(run.folder, run.phases, run.rank)
        reporter = None
        for phase in run.phases:
            if run.first_step >= phase.end and phase is not run.phases[-1]:
                continue
            loop, first_step = train.open_phase(run, phase, reporter)
            if stop_after is not None and stop_after < phase.end:
                ask_to_stop(loop, stop_after)
            outcome = loop.run(first_step)
            reporter = loop.reporter
            weights = {name: value.detach().clone() for name, value in loop.engine.module.state_dict().items()}
            loop.engine.destroy()
            if not outcome.is_complete:
                break
        reporter.close()
    return weights, outcome.step, phase.resolved.micro_batch


def ask_to_stop(loop, step):
    """As Ctrl-C would while that step runs."""
    train_one_step = loop._train_one_step

    def watched(position, batches):
        if loop._total(position) == step:
            loop.interruption.is_requested = True
        return train_one_step(position, batches)

    loop._train_one_step = watched


@contextlib.contextmanager
def out_of_memory_above(largest, rank, error=torch.OutOfMemoryError):
    """Batches of more images raise in the second of two micro-steps on one rank (None: all), when gradients are there already.

    And micro-batches are searched for on the CPU, too.
    """
    loss, num_calls = Classification.loss, {}

    def limited(self, model, batch, *, dtype):
        size = len(batch.labels)
        num_calls[size] = num_calls.get(size, 0) + 1
        if size > largest and num_calls[size] % 2 == 0 and rank in (None, dist.get_rank()):
            raise error(f"no room for {size} images")
        return loss(self, model, batch, dtype=dtype)

    search = functools.partial(engines.find_micro_batch, device=torch.device("cpu"))
    with patched(Classification, loss=limited), patched(train, find_micro_batch=search):
        yield
