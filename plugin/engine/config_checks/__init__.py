"""The part of a ds_config that DeepSpeed reads, checked before it does, with errors in the user's terms.

DeepSpeed ignores unknown top-level keys, takes "no" for true, and answers many wrong values from deep inside, or not at all.
Here its own models (pydantic) decide where it has them (section_models.py); for the entries that it only looks up, tables do
(known_entries.py); and what has to agree is compared (combinations.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from largebatch.config import UnknownOptionError, nearest_hint, reject
from largebatch.engine.config_checks.combinations import (
    check_batches,
    check_monitors,
    check_offload,
    check_parallelism,
    check_precision,
    check_scheduler,
    check_stage,
)
from largebatch.engine.config_checks.known_entries import (
    PRECISION_SECTIONS,
    SECTIONS,
    TOP_LEVEL,
    check_entries,
    section,
)
from largebatch.engine.config_checks.section_models import check_model, models
from largebatch.engine.internals import internal, refuse_newer_entry

MISSPELT = 0.85
"""Nearness (difflib's ratio) from which on a key is taken for a misspelt one: "comment" is not "comet"."""


def check_engine_config(
    config: Mapping[str, Any], *, world_size: int | None, num_ranks: int | None = None, is_closed: bool = False
) -> None:
    """Refuses what DeepSpeed would ignore, misread, or answer with an error of its own.

    Args:
        config: a ds_config; "auto" is allowed where DeepSpeed takes it for its default.
        world_size: of data parallelism, with which the batch has to agree; None: not known.
        num_ranks: of the job, data-parallel or not; None: not known.
        is_closed: refuse every unknown top-level key, not only those that are near a known one.

    Raises:
        ValueError, TypeError: naming the entry, its value and what is allowed.
    """
    known_models = models()
    sections = PRECISION_SECTIONS | SECTIONS
    known = {*TOP_LEVEL, *sections, *known_models} - {"timers.throughput"}
    for key, value in config.items():
        check_top_level_key(key, sorted(known), is_closed)
        refuse_newer_entry(key)
        if key in TOP_LEVEL:
            TOP_LEVEL[key](key, value)
        if key in known_models:
            check_model(key, value, known_models[key])
        elif key in sections:
            section(key, value)
            check_entries(key, value, sections[key])
            for entry in value:
                refuse_newer_entry(f"{key}.{entry}")
    timers = config.get("timers", {})
    check_entries("timers", timers, {"throughput": section})
    if "throughput" in timers:
        check_model("timers.throughput", timers["throughput"], known_models["timers.throughput"])
    check_batches(config, world_size)
    check_stage(config)
    if is_closed:
        check_data_parallel_only(config)
    check_parallelism(config, num_ranks)
    check_precision(config)
    check_offload(config)
    check_monitors(config)
    check_scheduler(config)


def check_data_parallel_only(config: Mapping[str, Any]) -> None:
    if config.get("sequence_parallel_size", 1) != 1:
        reject(
            "sequence_parallel_size", config["sequence_parallel_size"], "1: the trainer's models do not cut sequences"
        )
    size = config.get("tensor_parallel", {}).get("autotp_size", 0)
    if size not in (0, 1):
        reject("tensor_parallel.autotp_size", size, "0 or 1: the trainer does not cut its models")


def check_top_level_key(key: str, known: list[str], is_closed: bool) -> None:
    removed = internal("removed_entries")
    if key in removed:
        raise ValueError(f"{key} is no longer a key of DeepSpeed's: {removed[key]}")
    if key not in known and (is_closed or nearest_hint(key, known, nearness=MISSPELT)):
        raise UnknownOptionError(
            f"{key!r} is not a key of a ds_config{nearest_hint(key, known)}; known: {', '.join(known)}"
        )
