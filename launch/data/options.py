"""Data sets by name: what their "data_options" and augmentations are, without reading any data."""

from __future__ import annotations

from typing import Any

from largebatch.config import Check, UnknownOptionError, boolean, integer, nearest_hint, one_of, reject

DATA_SETS = ("digits", "mnist", "cifar10", "imagenet", "synthetic", "text")

AUGMENTATIONS: dict[str, tuple[str, ...]] = {
    "digits": ("none",),
    "mnist": ("none",),
    "cifar10": ("none", "davidnet"),
    "imagenet": ("none", "minimal", "inception", "maximal"),
    "synthetic": ("none",),
    "text": ("none",),
}
"""See augmentation.py."""

NUM_SAMPLES = {"imagenet": 1_281_167, "cifar10": 50_000, "mnist": 60_000, "digits": 1_437}
"""Images of the training sets, where a recipe's length does not depend on what the user has."""


def image_shape(name: str, value: Any) -> None:
    is_shape = isinstance(value, (list, tuple)) and len(value) == 3
    if not is_shape or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value):
        reject(name, value, "[channels, height, width], integers >= 1")


DEFAULTS: dict[str, dict[str, tuple[Any, Check]]] = {
    "digits": {"normalize": (True, boolean), "held_out": (0, integer(0))},
    "mnist": {"normalize": (True, boolean), "held_out": (0, integer(0))},
    "cifar10": {"normalize": (True, boolean), "held_out": (0, integer(0))},
    "imagenet": {
        "image_size": (224, integer(1)),
        "resize_size": ("auto", integer(1, or_auto=True)),
        "workers": ("auto", integer(0, or_auto=True)),
        "prefetch": (2, integer(1)),
        "on_corrupt": ("replace", one_of("replace", "error")),
    },
    "synthetic": {
        "num_samples": (1_281_167, integer(1)),
        "num_test_samples": (50_000, integer(1)),
        "image_shape": ([3, 224, 224], image_shape),
        "num_classes": (1000, integer(2)),
    },
}
"""Data set -> option -> (default, check).

- normalize: to mean 0 and standard deviation 1 over the training set, channel by channel; false: inputs are 0 to 1.
- held_out: so many training images, the last, take the place of the test set: for choosing settings without having seen it.
- image_size: height and width of the inputs. resize_size: of the shorter side before a crop to that; "auto": 8/7 of it, 256
  for 224.
- workers: processes a rank that read and decode; "auto": the cores that a rank has, at most 16; 0: the trainer itself.
- prefetch: times 64 images that each worker is ahead.
- on_corrupt: what a file that cannot be read does: "replace" it by the next one that can, or "error".
- num_samples, num_test_samples: size of the made-up set; image_shape: [channels, height, width]; the defaults are ImageNet's.
"""


def check_data_options(data: str, options: Any) -> None:
    """Refuses unknown and illegal options. Those of text are checked where it is read.

    Raises:
        ValueError, TypeError: naming the option, its value and what is allowed.
    """
    if not isinstance(options, dict):
        reject("largebatch.data_options", options, "a section (JSON object)", TypeError)
    if data not in DEFAULTS:
        return
    known = DEFAULTS[data]
    for option, value in options.items():
        if option not in known:
            raise UnknownOptionError(
                f"largebatch.data_options.{option} is not an option of {data}; expected one of "
                f"{', '.join(map(repr, known))}"
                f"{nearest_hint(option, list(known))}"
            )
        known[option][1](f"largebatch.data_options.{option}", value)
    filled = filled_options(data, options)
    if data == "imagenet" and filled["resize_size"] < filled["image_size"]:
        reject(
            "largebatch.data_options.resize_size",
            filled["resize_size"],
            f"a number >= image_size, which is {filled['image_size']}",
        )


def filled_options(data: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with their defaults."""
    filled = {name: default for name, (default, _) in DEFAULTS[data].items()} | options
    if filled.get("resize_size") == "auto":
        filled["resize_size"] = round(filled["image_size"] * 8 / 7)
    return filled
