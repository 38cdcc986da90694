"""The ranks' records, which travel through a launcher's standard output beside whatever else is printed there, sorted by node.

A record is JSON cut into lines short enough to be written at once (POSIX keeps up to 4,096 bytes on a pipe together), so
that ranks may share the pipe. pdsh and srun may put a node's name before each line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterable
from typing import Any

PIECE = 3000
PATTERN = re.compile(r"largebatch-doctor rank=(\d+) kind=(\w+) (\d+)/(\d+) (.*)")


def emit(kind: str, rank: int, record: dict[str, Any]) -> None:
    """Writes one record; a rank writes at most one of a kind."""
    text = json.dumps(record)  # ASCII: characters are bytes
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    for number, piece in enumerate(pieces, start=1):
        sys.stdout.write(f"largebatch-doctor rank={rank} kind={kind} {number}/{len(pieces)} {piece}\n")
        sys.stdout.flush()


def collect(lines: Iterable[str]) -> tuple[dict[str, dict[int, dict[str, Any]]], list[str]]:
    """Kind -> rank -> record, of those that arrived whole, and the lines that belong to none."""
    pieces: dict[tuple[str, int], dict[int, str]] = {}
    totals: dict[tuple[str, int], int] = {}
    others = []
    for line in lines:
        match = PATTERN.search(line.rstrip("\n"))
        if match is None:
            others.append(line.rstrip("\n"))
            continue
        rank, kind, number, total, piece = match.groups()
        totals[kind, int(rank)] = int(total)
        pieces.setdefault((kind, int(rank)), {})[int(number)] = piece
    records: dict[str, dict[int, dict[str, Any]]] = {}
    for (kind, rank), found in sorted(pieces.items()):
        if len(found) == totals[kind, rank]:
            text = "".join(found[number] for number in sorted(found))
            records.setdefault(kind, {})[rank] = json.loads(text)
    return records, others


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What the ranks reported.

    Attributes:
        nodes: name -> report of the node's first rank, with that ``rank``.
        errors: name of node -> what a rank there met while it joined the others.
        network: rank 0's figures; None where the ranks did not meet or there is one only.
        missing: names of nodes that were asked and gave no report.
        output: lines that belong to no report.
        slots: name -> ranks that the hostfile gives the node; empty without a hostfile.
    """

    nodes: dict[str, dict[str, Any]]
    errors: dict[str, str]
    network: dict[str, Any] | None
    missing: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    slots: dict[str, int] = dataclasses.field(default_factory=dict)

    def num_ranks(self, name: str) -> int:
        """Ranks that the node is to run."""
        return self.slots.get(name, self.nodes[name]["num_local_ranks"])

    def name_of(self, rank: int) -> str:
        """The node that holds a rank; the launchers number the ranks node by node."""
        starts = sorted((report["rank"], name) for name, report in self.nodes.items())
        return next((name for start, name in reversed(starts) if start <= rank), f"rank {rank}")


def gather(output: list[str], slots: dict[str, int]) -> Gathered:
    """Reports by node, under the hostfile's names where there is one, else under the hosts' own."""
    records, others = collect(output)
    reports = records.get("node", {})
    first_ranks = dict(zip(itertools.accumulate(slots.values(), initial=0), slots, strict=False))
    nodes: dict[str, dict[str, Any]] = {}
    for rank, report in reports.items():
        name = first_ranks.get(rank, report["interfaces"]["host"])
        if name in nodes:  # two hosts that call themselves the same
            name = f"{name} (rank {rank})"
        nodes[name] = {"rank": rank, **report}
    missing = [name for name in slots if name not in nodes]
    if not reports and not slots:
        missing = ["this machine"]
    elif not slots:
        world_size = max(report["world_size"] for report in reports.values())
        num_heard = sum(report["num_local_ranks"] for report in reports.values())
        if num_heard < world_size:
            missing = [f"{world_size - num_heard} of {world_size} ranks"]
    network = next(iter(records.get("network", {}).values()), None)
    gathered = Gathered(nodes, {}, network, tuple(missing), tuple(others), slots)
    for rank, error in records.get("error", {}).items():
        gathered.errors.setdefault(gathered.name_of(rank), error["message"])
    return gathered
