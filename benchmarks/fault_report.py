"""The report of a fault campaign, from its table of kills. Used by fault_campaign.py."""

from __future__ import annotations

import datetime
import pathlib
from collections import Counter

from fault_kills import MOMENTS, TARGETS
from harness import hardware, versions

NAMES = {
    "rank": "one rank",
    "launcher": "the process that started the ranks",
    "starter": "the `deepspeed` command",
    "job": "all of these at once",
    "supervisor": "`largebatch run` itself",
}


def write_report(rows: list[dict[str, str]], path: pathlib.Path, *, num_planned: int, command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines_of(rows, path, num_planned=num_planned, command=command)) + "\n", encoding="utf-8")


def lines_of(rows: list[dict[str, str]], path: pathlib.Path, *, num_planned: int, command: str) -> list[str]:
    runs = {row["run"]: row for row in rows}
    num_identical = sum(row["is_identical"] == "True" for row in runs.values())
    faults = [row for row in rows if row["faults"]]
    return [
        "# Fault campaign",
        "",
        f"    {command}",
        "",
        f"{len(rows)} kills with signal 9 at random moments in {len(runs)} training runs"
        f"{f', of {num_planned} planned; not finished yet' if len(rows) < num_planned else ''}. Every run was started "
        "again by `largebatch run` and trained to its end (a killed `largebatch run` was called again). A small MLP on "
        "scikit-learn's digits, two CPU ranks, fp32; the unmodified `deepspeed` launcher; checkpoints every few steps, the "
        "last three kept.",
        "",
        f"- Last checkpoints whose tensors (weights, fp32 masters, optimizer state) are the same bits as those of an "
        f"undisturbed run: {num_identical} of {len(runs)}.",
        f"- Kills after which a checkpoint was not whole, `latest` named none that is, or the newest was older than before: "
        f"{len(faults)} of {len(rows)}.",
        f"- Kills while a checkpoint was being written: {sum(row['was_saving'] == 'True' for row in rows)}.",
        f"- Whole checkpoints verified by their checksums: {sum(int(row['num_whole']) for row in rows)}.",
        "",
        f"{hardware('cpu')}, {versions('torch', 'deepspeed')}, "
        f"{datetime.date.today().isoformat()}. Every kill: [{path.with_suffix('.csv').name}]({path.with_suffix('.csv').name}).",
        "",
        "| | kills | while saving | runs | same bits |",
        "|---|---|---|---|---|",
        *(by_case(rows, stage, optimizer) for stage, optimizer in sorted({(r["stage"], r["optimizer"]) for r in rows})),
        "",
        "| killed | kills |",
        "|---|---|",
        *(f"| {NAMES[name]} | {count} |" for name, count in counted(rows, "target", TARGETS)),
        "",
        "| when | kills |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in counted(rows, "moment", MOMENTS)),
        "",
        "| checkpoints written | kills |",
        "|---|---|",
        *(
            f"| {'in the background' if value == 'True' else 'while training waits'} | {count} |"
            for value, count in sorted(Counter(row["in_background"] for row in rows).items())
        ),
        *(f"\n- kill {row['number']}: {row['faults']}" for row in faults),
    ]


def by_case(rows: list[dict[str, str]], stage: str, optimizer: str) -> str:
    mine = [row for row in rows if (row["stage"], row["optimizer"]) == (stage, optimizer)]
    runs = {row["run"]: row["is_identical"] == "True" for row in mine}
    num_saving = sum(row["was_saving"] == "True" for row in mine)
    return f"| ZeRO {stage}, {optimizer} | {len(mine)} | {num_saving} | {len(runs)} | {sum(runs.values())} |"


def counted(rows: list[dict[str, str]], key: str, names: dict[str, int]) -> list[tuple[str, int]]:
    counts = Counter(row[key] for row in rows)
    return [(name, counts[name]) for name in names]
