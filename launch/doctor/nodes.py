"""The nodes of a hostfile, and whether this machine can start something on each of them."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

from largebatch.launch.doctor.findings import FAILS, Finding

SLOTS = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
NO_FOLDER, NO_PYTHON = 3, 4
"""Exit codes of the command that :func:`login_findings` runs on a node."""

SSH_FIXES = {
    "could not resolve": "put the name into DNS or /etc/hosts here, or write the address into the hostfile",
    "host key verification failed": "ssh-keyscan {host} >> ~/.ssh/known_hosts, after comparing the key",
    "permission denied": "ssh-copy-id {host}, so that login needs no password",
    "connection refused": "start sshd on {host}, or give its port with --ssh_port",
    "timed out": "let port 22 through to {host}, or give the port of its sshd with --ssh_port",
    "no route to host": "check {host}'s address, cable and interface",
}


def read_hostfile(path: str) -> dict[str, int]:
    """Name -> slots, in the order of the file, which is that of the ranks.

    Raises:
        ValueError: no such file, a line that is not ``name slots=N``, a name twice, or no names.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--hostfile {path!r} cannot be read: {error}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = SLOTS.fullmatch(line)
        if match is None or int(match[2]) == 0:
            raise ValueError(f"--hostfile {path!r}, line {number}: {line!r}; expected 'NAME slots=N' with N > 0")
        if match[1] in slots:
            raise ValueError(f"--hostfile {path!r}, line {number}: {match[1]!r} is there twice; give it one line")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ValueError(f"--hostfile {path!r} names no node; expected lines 'NAME slots=N'")
    return slots


def launching_findings(hosts: list[str], *, ssh_port: int | None) -> list[Finding]:
    """What keeps ``deepspeed --hostfile`` from starting a rank on every node."""
    found = list(environment_file_findings())
    for tool in ("ssh", "pdsh"):
        if shutil.which(tool) is None:
            fix = f"install it; on Debian and Ubuntu: apt-get install {'openssh-client' if tool == 'ssh' else tool}"
            found.append(Finding(FAILS, "", f"{tool} is not on the PATH here; the launcher needs it", fix))
    if shutil.which("ssh") is not None:
        with concurrent.futures.ThreadPoolExecutor(max_workers=32) as pool:
            for findings in pool.map(lambda host: login_findings(host, ssh_port=ssh_port), hosts):
                found.extend(findings)
    return found


def environment_file_findings() -> Iterator[Finding]:
    """Lines of .deepspeed_env, here and in the home folder, at which DeepSpeed's launcher would stop."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for folder in (os.path.expanduser("~"), "."):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not re.match(r"\s*[A-Za-z_]\w*=", line):
                    fix = "write NAME=VALUE on each line: the launcher knows neither comments nor empty lines there"
                    yield Finding(FAILS, "", f"{path}, line {number}: {line.strip()!r} is not NAME=VALUE", fix)


def login_findings(host: str, *, ssh_port: int | None) -> list[Finding]:
    """Logs in without a password and looks for this folder and this Python there."""
    folder, python = os.getcwd(), sys.executable
    command = f"cd {shlex.quote(folder)} || exit {NO_FOLDER}; test -x {shlex.quote(python)} || exit {NO_PYTHON}"
    port = [] if ssh_port is None else ["-p", str(ssh_port)]
    ended = subprocess.run(
        ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *port, host, command], capture_output=True, text=True
    )
    if ended.returncode == 0:
        return []
    if ended.returncode == NO_FOLDER:
        fix = "the launcher starts in the same folder on every node: share it, or clone to the same path"
        return [Finding(FAILS, host, f"has no folder {folder!r}", fix)]
    if ended.returncode == NO_PYTHON:
        fix = "the launcher starts the same Python on every node: share the environment, or make it under the same path"
        return [Finding(FAILS, host, f"has no Python at {python!r}", fix)]
    message = ended.stderr.strip() or f"exit code {ended.returncode}"
    hint = next((fix for text, fix in SSH_FIXES.items() if text in message.lower()), "try by hand: ssh {host} true")
    return [Finding(FAILS, host, f"no login over ssh: {message.splitlines()[-1]}", hint.format(host=host))]
