"""Records that travel through a launcher's standard output, beside whatever else is printed there.

A record is JSON cut into lines short enough to be written at once (POSIX keeps up to 4,096 bytes on a pipe together), so
that ranks may share the pipe. pdsh and srun may put a node's name before each line.
"""

from __future__ import annotations

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
