"""The README's tables: between ``<!-- rows: module -->`` and ``<!-- end of rows -->`` stands what this writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from largebatch.schedule import scaled_lr

MARKED = re.compile(r"<!-- rows: (\w+) -->\n.*?<!-- end of rows -->", re.DOTALL)
HEADER = "| recipe | learning rate | warm-up | length | expected |\n|---|---|---|---|---|"


def with_rows(text: str, recipes: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """The README with every marked table written anew.

    Args:
        recipes: module of the table -> name -> ds_config.
    """

    def table(match: re.Match) -> str:
        rows = [row(name, config) for name, config in recipes[match[1]].items()]
        return "\n".join((f"<!-- rows: {match[1]} -->", HEADER, *rows, "<!-- end of rows -->"))

    return MARKED.sub(table, text)


def row(name: str, config: dict[str, Any]) -> str:
    section, expected = config["largebatch"], config["largebatch"]["expected"]
    lr = config["optimizer"]["params"]["lr"]
    if lr == "auto":
        lr = scaled_lr(**section["lr_scaling"], global_batch=config["train_batch_size"])
    phases = section.get("phases") or [{}]
    schedule = config["scheduler"]["params"] | phases[0].get("scheduler", {}).get("params", {})
    warmup = (
        f"{schedule['warmup_steps']} steps" if "warmup_steps" in schedule else f"{schedule.get('warmup_epochs', 0):.4g}"
    )
    lengths = [section | phase.get("largebatch", {}) for phase in phases]
    length = " + ".join(f"{part['epochs']}" if "epochs" in part else f"{part['steps']} steps" for part in lengths)
    accuracy = f"{'about ' if expected['is_approximate'] else ''}{expected['value']:.4g}" if expected else "-"
    return f"| `{name}` | {lr:.4g} | {warmup} | {length} | {accuracy} |"
