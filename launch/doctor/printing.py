"""The report as text: a paragraph for each node, the network's figures, then what was found."""

from __future__ import annotations

from typing import Any

from largebatch.launch.doctor.findings import FAILS, Finding, kind_of_device
from largebatch.launch.doctor.gathering import Gathered


def report_text(gathered: Gathered, findings: list[Finding]) -> str:
    paragraphs = [node_text(name, report) for name, report in gathered.nodes.items()]
    if gathered.network is not None:
        paragraphs.append(network_text(gathered))
    if findings:
        paragraphs.append("\n".join(finding_text(finding) for finding in findings))
    num_failures = sum(finding.level == FAILS for finding in findings)
    num_ranks = sum(map(gathered.num_ranks, gathered.nodes))
    if num_failures:
        last = f"{num_failures} {'thing' if num_failures == 1 else 'things'} would make a run fail"
    else:
        last = f"ready: {counted(num_ranks, 'rank')} on {counted(len(gathered.nodes), 'node')}"
    return "\n\n".join([*paragraphs, last])


def node_text(name: str, report: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v is not None)
    devices, memory, shared = report["devices"], report["memory"], report["shared_memory"]
    rows = [
        ("versions", f"{versions}, code {report['code']}"),
        ("python", report["executable"]),
        (
            "devices",
            f"{devices['count']} x {kind_of_device(report)}"
            if devices["cuda_devices"]
            else f"{devices['count']} cores",
        ),
        ("processor", devices["cpu"]),
        ("kernels", "; ".join(f"{k} {v}" for k, v in report["kernels"].items())),
        ("compiler", report["tools"]["compiler"] or "none"),
        ("ninja", report["tools"]["ninja"] or "none"),
        (
            "memory",
            f"{size(memory['available'])} of {size(memory['total'])} available; /dev/shm {size(shared['free'])} free",
        ),
        ("results", f"{report['disk']['path']}, {size(report['disk']['free'])} free"),
    ]
    for index, device in enumerate(devices["cuda_devices"]):
        rows.insert(3 + index, (f"cuda:{index}", f"{size(device['free'])} of {size(device['total'])} free"))
    if report["data"] is not None:
        data = report["data"]
        state = data["problem"] or f"{data['num_entries']} entries, digest {data['digest']}"
        rows.append(("data", f"{data['path']}: {state}"))
    if report["environment"]:
        rows.append(("environment", " ".join(f"{k}={v}" for k, v in report["environment"].items())))
    return "\n".join([f"{name} ({counted(report['num_local_ranks'], 'rank')})", *(f"  {k:<12}{v}" for k, v in rows)])


def network_text(gathered: Gathered) -> str:
    network = gathered.network
    rows = [f"network ({network['backend']}, {counted(network['world_size'], 'rank')})"]
    for figures in network["all_reduce"]:
        rows.append(
            f"  all-reduce  {size(figures['bytes']):>9}  {duration(figures['seconds']):>8}  {figures['bandwidth'] / 1e6:9.1f} MB/s"
        )
    for line in network["lines"]:
        rows.append(
            f"  rank 0 to {gathered.name_of(line['rank'])}: latency {duration(line['latency'])}, "
            f"{line['bandwidth'] / 1e6:.0f} MB/s, clock {line['clock_offset'] * 1e3:+.2f} ms"
        )
    return "\n".join(rows)


def finding_text(finding: Finding) -> str:
    where = f"{finding.node}: " if finding.node else ""
    return f"{finding.level}: {where}{finding.problem}\n       {finding.fix}"


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
