"""Sections for which DeepSpeed has models (pydantic): these decide, without their conversions from other types."""

from __future__ import annotations

import types
import typing
from typing import Any

from largebatch.config import boolean, check_option_names, is_number, one_of, reject
from largebatch.engine.config_checks.known_entries import section, text
from largebatch.engine.internals import internal

MODELS = {
    "zero_optimization": "DeepSpeedZeroConfig",
    "fp16": "DeepSpeedFP16Config",
    "bf16": "DeepSpeedBF16Config",
    "bfloat16": "DeepSpeedBF16Config",
    "tensorboard": "TensorBoardConfig",
    "wandb": "WandbConfig",
    "csv_monitor": "CSVConfig",
    "comet": "CometConfig",
    "comms_logger": "CommsLoggerConfig",
    "compile": "CompileConfig",
    "hybrid_engine": "HybridEngineConfig",
    "tensor_parallel": "TPTrainingConfig",
    "weight_quantization": "WeightQuantConfig",
    "timers.throughput": "DeepSpeedThroughputTimerConfig",
}
"""Section -> DeepSpeed's model of it, where the version at hand has one."""


def models() -> dict[str, type]:
    """Section -> model, of the DeepSpeed at hand."""
    found = {section_name: internal(model) for section_name, model in MODELS.items()}
    return {section_name: model for section_name, model in found.items() if model is not None}


def check_model(name: str, entries: Any, model: type) -> None:
    """Types as they are written in the model, without its conversions from other types; then the model itself."""
    from pydantic import ValidationError

    section(name, entries)
    fields = {alias: field for key, field in model.model_fields.items() for alias in (key, field.alias) if alias}
    removed = internal("removed_zero_entries") if name == "zero_optimization" else {}
    for key, value in entries.items():
        if key in removed:
            raise ValueError(f"{name}.{key} is no longer a key of DeepSpeed's: {removed[key]}")
        check_option_names({key: value}, list(fields), name)
        if value == "auto":
            continue
        kind = without_none(fields[key].annotation)
        if isinstance(kind, type) and hasattr(kind, "model_fields"):
            if value is not None:
                check_model(f"{name}.{key}", value, kind)
        elif value is not None and kind is bool:
            boolean(f"{name}.{key}", value)
        elif kind is internal("ZeroStageEnum"):
            one_of(0, 1, 2, 3)(f"{name}.{key}", value)
        elif value is not None and kind in (int, float):
            check_number(f"{name}.{key}", value, kind)
        elif kind is str:
            text(f"{name}.{key}", value)
    try:
        model(**entries)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join([name, *map(str, first["loc"])])
        value = first["input"] if first["loc"] else entries  # without a place it is the whole section
        raise ValueError(f"{path} is {value!r}; {sentence(first['msg'])}") from None
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is {entries!r}; {sentence(str(error))}") from None


def without_none(annotation: Any) -> Any:
    """T of Optional[T]; other annotations as they are."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation


def check_number(name: str, value: Any, kind: type) -> None:
    """DeepSpeed's integers may be written as 5e8."""
    expected = "a whole number" if kind is int else "a number"
    if not is_number(value):
        reject(name, value, expected, TypeError)
    if not -(2**63) <= value < 2**63 or (kind is int and value != int(value)):
        reject(name, value, f"{expected} of at most 64 bits" if abs(value) >= 2**63 else expected)


def sentence(message: str) -> str:
    """One line, as the end of a sentence."""
    line = " ".join(message.split()).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return line.replace("Input should be", "expected").rstrip(".")
