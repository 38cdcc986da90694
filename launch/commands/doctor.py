"""``largebatch doctor``: checks one node, or with --hostfile all of them, before a run is started."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from largebatch.launch.doctor.findings import FAILS, Finding, Requirements, judge
from largebatch.launch.doctor.gathering import Gathered, gather
from largebatch.launch.doctor.launching import launch
from largebatch.launch.doctor.nodes import launching_findings, read_hostfile
from largebatch.launch.doctor.printing import report_text
from largebatch.launch.recipe.flags import ABOVE_ZERO, ONE_OR_MORE, Parser

GIB = 1 << 30


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 ready, 1 if something would make a run fail, 2 after one line on what is wrong with the request."""
    arguments = parse_arguments(argv)
    if arguments.patches:
        return print_patches()
    try:
        slots = read_hostfile(arguments.hostfile) if arguments.hostfile else {}
        if arguments.read:
            gathered, findings = gather(read_lines(arguments.read), slots), []
        else:
            findings = launching_findings(list(slots), ssh_port=arguments.ssh_port) if slots else []
            output = [] if findings else launch(arguments, slots)
            gathered = gather(output, slots)
    except (ValueError, OSError) as error:
        print(f"largebatch: error: {error}", file=sys.stderr)
        return 2
    if not findings:
        requirements = Requirements(memory_per_rank=arguments.need_memory * GIB, disk=arguments.need_disk * GIB)
        findings = judge(gathered, requirements)
    if arguments.json:
        print(json.dumps(as_json(gathered, findings), indent=2))
    else:
        print(report_text(gathered, findings))
    return 1 if any(finding.level == FAILS for finding in findings) else 0


def print_patches() -> int:
    """What largebatch changes in DeepSpeed, and whether the one that is installed has it all: 1 if not."""
    from largebatch.engine import internals, patches

    print(patches.listing())
    try:
        patches.check_all_there()
    except RuntimeError as error:
        print(f"largebatch: error: {error}", file=sys.stderr)
        return 1
    print(f"{internals.versions()} has all that is changed or read")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="largebatch doctor",
        description="Looks for what would make a run fail: versions, devices, kernels, memory, disk, data, network and clocks "
        "of every node, through the launcher that starts training.",
        epilog="Without --hostfile: this machine. Under SLURM: srun ... python -m largebatch.launch.doctor.rank_check | largebatch doctor --read -",
        earlier={"--need_memory": "--need-memory", "--need_disk": "--need-disk"},
    )
    parser.add_argument("--hostfile", metavar="FILE", help="nodes, as for deepspeed: lines NAME slots=N")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set, as for launch/train.py")
    parser.add_argument("--output", metavar="DIR", default="runs", help="where results will go (default: runs)")
    parser.add_argument(
        "--ranks", type=ONE_OR_MORE, metavar="N", help="ranks without --hostfile (default: one a GPU, else 2)"
    )
    parser.add_argument(
        "--need-memory", type=ABOVE_ZERO, default=2.0, metavar="GIB", help="host memory of a rank (default: 2)"
    )
    parser.add_argument(
        "--need-disk", type=ABOVE_ZERO, default=1.0, metavar="GIB", help="disk for results (default: 1)"
    )
    parser.add_argument(
        "--timeout", type=ABOVE_ZERO, default=60.0, metavar="SECONDS", help="for the ranks to meet (default: 60)"
    )
    parser.add_argument("--master-addr", "--master_addr", metavar="ADDRESS", help="of rank 0, as for deepspeed")
    parser.add_argument(
        "--master-port",
        "--master_port",
        type=ONE_OR_MORE,
        default=29500,
        metavar="PORT",
        help="as for deepspeed (default: 29500)",
    )
    parser.add_argument("--ssh-port", "--ssh_port", type=ONE_OR_MORE, metavar="PORT", help="as for deepspeed")
    parser.add_argument(
        "--read", metavar="FILE", help="judge what rank_check has printed under another launcher (-: standard input)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--patches", action="store_true", help="print what largebatch changes in DeepSpeed, and why, and nothing else"
    )
    return parser.parse_args(argv)


def read_lines(path: str) -> list[str]:
    if path == "-":
        return sys.stdin.read().splitlines()
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def as_json(gathered: Gathered, findings: list[Finding]) -> dict[str, Any]:
    return {
        "is_ready": not any(finding.level == FAILS for finding in findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "nodes": gathered.nodes,
        "network": gathered.network,
        "errors": gathered.errors,
    }


if __name__ == "__main__":
    sys.exit(main())
