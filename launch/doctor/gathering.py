"""The ranks' records, sorted by node."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from largebatch.launch.doctor import lines


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
    records, others = lines.collect(output)
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
