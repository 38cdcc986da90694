"""Judges the records: what would make a run fail, what would slow it down or mislead it, and how to mend each."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

from largebatch.launch.doctor import node_findings
from largebatch.launch.doctor.gathering import Gathered
from largebatch.launch.doctor.node_findings import FAILS, WARNS

SAME_EVERYWHERE = {
    "python": "the same Python (major and minor version)",
    "torch": "the same torch: collectives of different versions do not fit each other",
    "deepspeed": "the same deepspeed",
    "largebatch": "the same largebatch",
    "cuda": "torch built for the same CUDA",
    "nccl": "the same NCCL: different versions refuse each other or hang",
}
MOST_CLOCK_SKEW = 1.0
"""Seconds; beyond it times in logs and files mislead."""

SLOW_LINE = 0.5
"""A line below this share of the median bandwidth slows every all-reduce down."""

SLOW_ALL_REDUCE = 125e6
"""Bytes/s, a 1 Gbit/s line: the gradients of ResNet-50 in fp32 (102 MB) then cost about a second a step."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong. ``level`` is "fails" or "warns"; ``node`` is "" where it concerns all."""

    level: str
    node: str
    problem: str
    fix: str


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What a run needs, in bytes: host memory of each rank, free disk of each node."""

    memory_per_rank: float
    disk: float


def judge(gathered: Gathered, requirements: Requirements) -> list[Finding]:
    """All findings, those that make a run fail first."""
    num_nodes = len(gathered.nodes) + len(gathered.missing)
    found = [*missing_nodes(gathered)]
    for name, report in gathered.nodes.items():
        for level, problem, fix in node_findings.judge(
            report,
            num_nodes=num_nodes,
            num_ranks=gathered.num_ranks(name),
            memory_per_rank=requirements.memory_per_rank,
            disk=requirements.disk,
        ):
            found.append(Finding(level, name, problem, fix))
    found.extend(differences(gathered.nodes))
    found.extend(network_findings(gathered))
    return sorted(found, key=lambda finding: finding.level != FAILS)


def missing_nodes(gathered: Gathered) -> Iterator[Finding]:
    for name in gathered.missing:
        own = [line for line in gathered.output if line.startswith(f"{name}: ")] or list(gathered.output)
        last = " | ".join(line.strip() for line in own[-4:] if line.strip())
        yield Finding(
            FAILS,
            name,
            f"gave no report; its last output: {last or 'none'}",
            "install largebatch there as it is here (same Python, same path); by hand: python -m largebatch.launch.doctor.rank_check",
        )


def differences(nodes: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """What must be equal on all nodes and is not."""
    for name, meaning in SAME_EVERYWHERE.items():
        values = {node: report["versions"].get(name) for node, report in nodes.items()}
        if name == "python":
            values = {node: ".".join(str(value).split(".")[:2]) for node, value in values.items()}
        if len(set(values.values())) > 1:
            yield Finding(FAILS, "", f"{name} differs: {listed(values)}", f"install {meaning} on all nodes")
    codes = {node: report["code"] for node, report in nodes.items()}
    if len(set(codes.values())) > 1 and len({report["versions"].get("largebatch") for report in nodes.values()}) == 1:
        fix = "bring all nodes to the same commit, or share one folder"
        yield Finding(FAILS, "", f"the files of largebatch differ: {listed(codes)}", fix)
    digests = {
        node: report["data"]["digest"]
        for node, report in nodes.items()
        if report["data"] and not report["data"]["problem"]
    }
    if len(set(digests.values())) > 1:
        fix = "copy the data set anew; ranks would otherwise draw different samples under the same number"
        yield Finding(FAILS, "", f"the data folders differ in names or sizes: {listed(digests)}", fix)
    kinds = {node: kind_of_device(report) for node, report in nodes.items()}
    if len({report["devices"]["type"] for report in nodes.values()}) > 1:
        fix = "let all ranks run on the same type of device (DS_ACCELERATOR, CUDA_VISIBLE_DEVICES)"
        yield Finding(FAILS, "", f"device types differ: {listed(kinds)}", fix)
    elif len(set(kinds.values())) > 1:
        yield Finding(WARNS, "", f"devices differ: {listed(kinds)}", "the slowest sets the pace; use nodes of one kind")
    processors = {node: report["devices"]["cpu"] for node, report in nodes.items()}
    if len(set(processors.values())) > 1:
        yield Finding(
            WARNS,
            "",
            f"processors differ: {listed(processors)}",
            "DeepSpeed compiles its C++ parts for the processor at hand; give each kind its own TORCH_EXTENSIONS_DIR",
        )
    kernels = {node: report["kernels"]["cpp"].partition(":")[0] for node, report in nodes.items()}
    if "no" in kernels.values() and set(kernels.values()) != {"no"}:
        yield Finding(WARNS, "", f"cpp kernels differ: {listed(kernels)}", "see the nodes; the slowest sets the pace")


def network_findings(gathered: Gathered) -> Iterator[Finding]:
    for name, message in gathered.errors.items():
        address = next((r["environment"] for r in gathered.nodes.values() if "MASTER_ADDR" in r["environment"]), {})
        meeting = f"{address.get('MASTER_ADDR', 'rank 0')}:{address.get('MASTER_PORT', '')}".rstrip(":")
        yield Finding(
            FAILS,
            name,
            f"does not meet the other ranks at {meeting}: {message}",
            "open the ports between the nodes (all, not only this one), name an address that all reach with --master_addr, and "
            "the interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in .deepspeed_env",
        )
    network = gathered.network
    if network is None:
        if len(gathered.nodes) > 1 and not gathered.errors:
            fix = "look at the output above; a rank may have been killed"
            yield Finding(FAILS, "", "the ranks reported no network figures", fix)
        return
    if network["is_folder_shared"] is False:
        problem = "the nodes do not share the folder for results; each keeps its own ranks' part of the checkpoints"
        fix = "share it; or add --set checkpoint.use_node_local_storage=true, without which --resume fails"
        yield Finding(WARNS, "", problem, fix)
    for line in network["lines"]:
        if abs(line["clock_offset"]) > MOST_CLOCK_SKEW:
            fix = "synchronise the clocks (chrony or ntp on all nodes)"
            clock = f"its clock is {line['clock_offset']:+.1f} s off rank 0's (allowed: {MOST_CLOCK_SKEW:.0f} s)"
            yield Finding(WARNS, gathered.name_of(line["rank"]), clock, fix)
    if len(network["lines"]) > 1:
        median = statistics.median(line["bandwidth"] for line in network["lines"])
        for line in network["lines"]:
            if line["bandwidth"] < SLOW_LINE * median:
                speed = (
                    f"its line to rank 0 carries {line['bandwidth'] / 1e6:.0f} MB/s, the median is {median / 1e6:.0f}"
                )
                fix = "check cable, port and interface of this node; all ranks wait for the slowest"
                yield Finding(WARNS, gathered.name_of(line["rank"]), speed, fix)
    if len(gathered.nodes) > 1:
        fastest = max(figures["bandwidth"] for figures in network["all_reduce"])
        if fastest < SLOW_ALL_REDUCE:
            problem = f"an all-reduce over the nodes moves {fastest / 1e6:.0f} MB/s at best"
            fix = "name the fast interface with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; accumulate more, with ZeRO 1"
            yield Finding(WARNS, "", problem, fix)


def kind_of_device(report: dict[str, Any]) -> str:
    names = sorted({device["name"] for device in report["devices"]["cuda_devices"]})
    return ", ".join(names) or report["devices"]["type"]


def listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{node} has {value}" for node, value in values.items())
