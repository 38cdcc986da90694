"""Worker processes joined in gloo groups, kept for the whole session: a multi-rank test costs milliseconds."""

import faulthandler
import multiprocessing
import os
import pickle
import traceback

import pytest

from largebatch.launch.supervise.launcher import free_port

TASK_SECONDS = 900


class RankPool:
    """Runs module-level functions on groups of 1 to 4 ranks; each size has processes of its own."""

    def __init__(self):
        # forked from a server that has torch and deepspeed loaded: no import per rank
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["support.rank_preload"])
        self.groups = {}

    def run(self, world_size, function, *args, **kwargs):
        """[result of rank 0, of rank 1, ...]; raises AssertionError with the ranks' tracebacks if one failed."""
        if world_size not in self.groups:
            self.groups[world_size] = self._start(world_size)
        workers = self.groups[world_size]
        for _, pipe in workers:
            pipe.send_bytes(pickle.dumps((function, args, kwargs)))
        outcomes = []
        for rank, (process, pipe) in enumerate(workers):
            if not pipe.poll(TASK_SECONDS + 10):
                self._stop(world_size)
                raise AssertionError(f"rank {rank} of {world_size}: no answer after {TASK_SECONDS + 10} s")
            try:
                outcomes.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                self._stop(world_size)
                raise AssertionError(f"rank {rank} of {world_size} ended with exit code {process.exitcode}") from None
        if all(is_ok is None for is_ok, _ in outcomes):
            pytest.skip(f"refused: {outcomes[0][1]}")
        failures = [f"rank {r} of {world_size}:\n{text}" for r, (is_ok, text) in enumerate(outcomes) if not is_ok]
        if failures:
            self._stop(world_size)  # its process group may be out of step
            raise AssertionError("\n".join(failures))
        return [result for _, result in outcomes]

    def _start(self, world_size):
        port = free_port()
        workers = []
        for rank in range(world_size):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=work, args=(theirs, rank, world_size, port), daemon=True)
            process.start()
            theirs.close()
            workers.append((process, ours))
        return workers

    def _stop(self, world_size):
        for process, pipe in self.groups.pop(world_size):
            pipe.close()
            process.terminate()
            process.join(20)

    def close(self):
        for world_size in list(self.groups):
            for _, pipe in self.groups[world_size]:
                pipe.close()  # the worker sees the end of its input and leaves
            for process, _ in self.groups.pop(world_size):
                process.join(20)
                if process.is_alive():
                    process.terminate()


def work(pipe, rank, world_size, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch
    import torch.distributed as dist

    from largebatch.engine.internals import DeepSpeedFaultError
    from support.rank_preload import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    try:
        while True:
            try:
                function, args, kwargs = pickle.loads(pipe.recv_bytes())
            except EOFError:
                break
            faulthandler.dump_traceback_later(TASK_SECONDS, exit=True)
            try:
                outcome = (True, function(*args, **kwargs))
            except DeepSpeedFaultError as error:  # on every rank alike
                outcome = (None, str(error))
            except BaseException:
                outcome = (False, traceback.format_exc())
            faulthandler.cancel_dump_traceback_later()
            pipe.send_bytes(pickle.dumps(outcome))
    finally:
        dist.destroy_process_group()
