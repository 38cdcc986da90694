"""All tables together, and how a recipe looks in its file."""

from __future__ import annotations

import json
from typing import Any

from largebatch.ds_configs.tables import (
    bert,
    bert_lans,
    cifar10,
    lamb_2019,
    lars_2017,
    mlperf,
    mlperf_bert,
    nus,
    sgd_2017,
)

SOURCES = (lars_2017, mlperf, nus, lamb_2019, sgd_2017, cifar10, bert, bert_lans, mlperf_bert)


def by_source() -> dict[str, dict[str, dict[str, Any]]]:
    """Module of the table -> file name without .json -> ds_config."""
    return {source.__name__.rpartition(".")[2]: dict(source.recipes()) for source in SOURCES}


def all_recipes() -> dict[str, dict[str, Any]]:
    """File name without .json -> ds_config."""
    named = [row for source in SOURCES for row in source.recipes()]
    assert len(dict(named)) == len(named), "two rows have one name"
    return dict(named)


def text_of(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
