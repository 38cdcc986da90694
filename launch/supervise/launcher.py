"""The deepspeed launcher: what it is told, its job as a child of ours, and a run without it. Linux."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import psutil
from packaging.version import Version

from largebatch.launch.supervise.signals import die_with_parent


def free_port() -> int:
    """A TCP port that nothing listened on a moment ago."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def launcher_options(num_ranks: int, port: int | None = None) -> list[str]:
    """For so many processes on this machine, with a port of their own, and without the launcher's own log.

    DeepSpeed's launcher knows --log_level from 0.17.6 on.
    """
    is_quiet = Version(importlib.metadata.version("deepspeed")).release >= (0, 17, 6)
    quietly = ["--log_level", "error"] if is_quiet else []
    return ["--num_accelerators", str(num_ranks), "--master_port", str(port or free_port()), *quietly]


MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")


def is_launched() -> bool:
    """Whether a launcher has told this process its rank (deepspeed, torchrun, SLURM's script), or MPI will."""
    return "RANK" in os.environ or any(name in os.environ for name in MPI_VARIABLES)


def be_the_only_rank() -> None:
    """Sets what a launcher would have set for one rank on this machine."""
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )  # fmt: skip
    print("largebatch: started without a launcher: one rank (several: deepspeed launch/train.py ...)", flush=True)


PR_SET_CHILD_SUBREAPER = 36
SECONDS_BETWEEN_LOOKS = 0.3


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent is gone, so that ranks are never out of sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class SupervisedJob:
    """A launcher and all that it started, on this node.

    Args:
        command: of the launcher. It gets a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone,
            and SIGTERM when the supervisor is gone.
    """

    def __init__(self, command: list[str]):
        self.launcher = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)

    @property
    def exit_code(self) -> int | None:
        """Of the launcher; negative: the signal that ended it; None while it runs."""
        return self.launcher.poll()

    def processes(self) -> list[psutil.Process]:
        """All that are left, the launcher included."""
        left = psutil.Process().children(recursive=True)
        return [p for p in left if is_alive(p)]

    def ranks(self) -> list[psutil.Process]:
        """Those that a launcher has given a rank, and that have not inherited it from another rank."""
        return [
            p for p in self.processes() if has_rank(p) and not any(map(has_rank, quietly(lambda p=p: [p.parent()])))
        ]

    def ask_to_stop(self) -> None:
        """SIGTERM to the ranks, which save and end. Not to their launcher, which would kill them after 30 s.

        Ranks on other nodes get theirs through the launcher, with those 30 s.
        """
        told = self.ranks()
        if not told and self.exit_code is None:
            told = quietly(lambda: [psutil.Process(self.launcher.pid)])
        for process in told:
            quietly(lambda p=process: [p.send_signal(signal.SIGTERM)])

    def wait(self, seconds: float) -> bool:
        """Whether nothing is left after at most so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            self.reap()
            if not self.processes():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def end(self, grace: float) -> None:
        """Asks all that are left to stop, and kills what is still there after so many seconds."""
        if self.processes():
            self.ask_to_stop()
        if not self.wait(grace):
            while left := self.processes():
                for process in left:
                    quietly(lambda p=process: [p.send_signal(signal.SIGKILL)])
                self.wait(5.0)
        self.launcher.wait()

    def reap(self) -> None:
        """Takes note of deaths. The launcher's is Popen's to see, or its exit code would be lost."""
        self.launcher.poll()
        for process in psutil.Process().children():
            is_over = quietly(lambda p=process: [p] if p.status() == psutil.STATUS_ZOMBIE else [])
            if is_over and process.pid != self.launcher.pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)


def has_rank(process: psutil.Process | None) -> bool:
    with contextlib.suppress(psutil.Error):
        return process is not None and "LOCAL_RANK" in process.environ()
    return False


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def quietly(call: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    """What a call on a process finds; nothing if that is gone."""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        return call()
    return []


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM are counted; yields whether there was one."""
    requests: list[int] = []
    previous = {s: signal.signal(s, lambda n, _: requests.append(n)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    print(free_port())
