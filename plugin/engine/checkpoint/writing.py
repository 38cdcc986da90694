"""What DeepSpeed writes for a checkpoint, handed to a writer of the caller's."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from largebatch.engine.patches import temporarily

Write = Callable[[Any, str], None]
"""(state, path): writes a file of a checkpoint, or sees to it that it will be written."""


@contextlib.contextmanager
def collected_errors(errors: list[str]) -> Iterator[None]:
    """Keeps an error of the file system for later, when all ranks can speak of it."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:  # torch.save says RuntimeError when the disk is full
        errors.append(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def files_handed_to(engine: Any, write: Write, errors: list[str]) -> Iterator[None]:
    """Inside, the engine's files go through ``write``, and what it writes by itself raises nothing: errors are for later."""
    writer = engine.checkpoint_engine

    def collecting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with collected_errors(errors):
                return function(*args, **kwargs)

        return call

    replaced = (
        (writer, "save", lambda state_dict, path: write(state_dict, path)),
        (writer, "makedirs", collecting(writer.makedirs)),
        (engine, "_copy_recovery_script", collecting(engine._copy_recovery_script)),
        (shutil, "copytree", collecting(shutil.copytree)),  # of files that were offloaded to NVMe
    )
    with temporarily(replaced):
        yield
