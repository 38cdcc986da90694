"""What the other ranks say when one is killed, or hangs."""

import datetime
import os
import pathlib
import signal
import time

import pytest
import torch
import torch.distributed as dist

from largebatch.engine.initialization import set_timeout_of_all_groups
from largebatch.launch.supervise import exits
from support.rank_pool import RankPool

SECONDS = 2.0


def lose(how, folder):
    """Rank 1 is lost; rank 0 goes on with a collective and writes down what it would say."""
    seconds = SECONDS if how == "hangs" else 600
    timeout = datetime.timedelta(seconds=seconds)
    group = dist.new_group()
    set_timeout_of_all_groups(timeout)
    said = pathlib.Path(folder) / "said"
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while not said.exists():
            time.sleep(0.05)
        return
    try:
        dist.all_reduce(torch.ones(3), group=group)
        line = "nothing was noticed"
    except RuntimeError as error:
        assert exits.is_lost_rank(error)
        line = exits.explanation(error, rank=0, world_size=2, step=17, timeout=timeout)
    (pathlib.Path(folder) / "line").write_text(line)
    said.touch()


@pytest.mark.parametrize(
    "how, words",
    [
        ("killed", "has lost the connection to another rank, which ended or is off the network, after step 17 ("),
        (
            "hangs",
            f"has waited {SECONDS:g} s for the other ranks (largebatch.collective_timeout_seconds); one of them hangs",
        ),
    ],
)
def test_the_survivor_explains(tmp_path, how, words):
    pool = RankPool()  # its ranks do not survive
    try:
        if how == "killed":
            with pytest.raises(AssertionError, match="rank 1 of 2 ended with exit code -9"):
                pool.run(2, lose, how, str(tmp_path))
        else:
            pool.run(2, lose, how, str(tmp_path))
    finally:
        for workers in pool.groups.values():
            for process, _ in workers:
                process.kill()
        pool.close()
    line = (tmp_path / "line").read_text()
    assert line.startswith("rank 0 of 2 ") and words in line and "--resume" in line and "\n" not in line


@pytest.mark.parametrize(
    "error, is_lost",
    [
        (
            dist.DistNetworkError("The server socket has failed to listen on any local network address. EADDRINUSE"),
            True,
        ),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:2"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection is 3; expected 4"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_what_counts_as_lost(error, is_lost):
    assert exits.is_lost_rank(error) == is_lost


def test_the_timeout_is_the_recipes_else_deepspeeds(monkeypatch):
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert exits.timeout_of({"collective_timeout_seconds": None}).total_seconds() == 600
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "3")
    assert exits.timeout_of({"collective_timeout_seconds": None}).total_seconds() == 180
    assert exits.timeout_of({"collective_timeout_seconds": 1.5}).total_seconds() == 1.5
