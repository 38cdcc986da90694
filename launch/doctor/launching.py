"""The check on every rank of every node, through the launcher that starts training."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys

START_SECONDS = 120
"""For launcher and imports, on top of --timeout; then what still runs is ended."""


def launch(arguments: argparse.Namespace, slots: dict[str, int]) -> list[str]:
    """The output of the deepspeed launcher with one rank_check on every rank.

    Raises:
        OSError: there is no launcher.
    """
    program = shutil.which(
        "deepspeed", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    )
    if program is None:
        raise FileNotFoundError(
            "the deepspeed launcher is neither beside this Python nor on the PATH; pip install deepspeed"
        )
    command = [program, "--master_port", str(arguments.master_port)]
    if slots:
        command += ["--hostfile", arguments.hostfile]
        command += ["--master_addr", arguments.master_addr] if arguments.master_addr else []
        command += ["--ssh_port", str(arguments.ssh_port)] if arguments.ssh_port else []
    else:
        # no file: one in DeepSpeed's default place would send the check elsewhere
        command += ["--hostfile", "", "--num_accelerators", str(arguments.ranks or default_ranks())]
    command += ["--module", "largebatch.launch.doctor.rank_check", "--output", arguments.output]
    command += ["--timeout", str(arguments.timeout)]
    command += ["--data", arguments.data] if arguments.data else []
    process = subprocess.Popen(
        command,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=arguments.timeout + START_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher then ends the ranks on all nodes
        try:
            output, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    except BaseException:
        process.terminate()
        raise
    return output.splitlines()


def launch_environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    import torch

    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def default_ranks() -> int:
    import torch

    return torch.cuda.device_count() or 2
