"""JSON files of users: read whole, or refused with the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 24
"""Characters; a link to a device has no end."""

DEEPEST = 64
"""Levels of a ds_config; those that DeepSpeed reads have six."""


def read_json(path: str, name: str, parse: Callable[..., Any] = json.loads) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        name: of the file in messages, e.g. "--deepspeed_config 'recipe.json'".
        parse: of a text; ``hjson.loads`` for files in which DeepSpeed allows comments.

    Raises:
        ValueError: the file cannot be read, is no JSON, holds no object, or has a key twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    if len(text) > LARGEST:
        raise ValueError(f"{name} has more than {LARGEST:,} characters; expected a JSON object of fewer")
    if not text.strip():
        raise ValueError(f"{name} is empty; expected a JSON object")
    try:
        content = parse(text, object_pairs_hook=without_repetition)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; expected at most {DEEPEST} levels") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}; expected a JSON object")
    if depth(content) > DEEPEST:
        raise ValueError(f"{name} is nested {depth(content)} levels deep; expected at most {DEEPEST}")
    return content


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the parsers would take the last of two equal keys without a word."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one section; keep one of them")
        found[key] = value
    return found


def depth(content: Any) -> int:
    """Levels of dicts and lists inside each other."""
    levels, nodes = 0, [content]
    while nodes := [node for node in nodes if isinstance(node, (dict, list))]:
        levels += 1
        nodes = [child for node in nodes for child in (node.values() if isinstance(node, dict) else node)]
    return levels
