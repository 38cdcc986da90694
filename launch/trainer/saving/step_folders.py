"""The files of a checkpoint: whole or not, by a manifest of sizes and checksums. No engine, no ranks.

A checkpoint is a folder ``step<N>``. It is written as ``step<N>.partial``; the manifest is its last file, and then it is
renamed. What has no manifest, or not what the manifest says, is damaged and never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from typing import Any

MANIFEST = "manifest.json"
LATEST = "latest"
BLOCK_BYTES = 1 << 22


def name_of(step: int) -> str:
    return f"step{step}"


def steps_in(folder: str) -> list[int]:
    """Steps of the checkpoints in a folder, whole or not, newest first; without those that were never finished."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((int(m[1]) for name in names if (m := re.fullmatch(r"step(\d+)", name))), reverse=True)


def checksum(path: str) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def files_in(checkpoint: str) -> list[str]:
    """Paths of all files but the manifest, relative to the checkpoint, sorted."""
    paths = [
        os.path.relpath(os.path.join(folder, name), checkpoint)
        for folder, _, names in os.walk(checkpoint)
        for name in names
    ]
    return sorted(path for path in paths if path != MANIFEST)


def is_inside(name: str) -> bool:
    """Whether a manifest's path is one that ``files_in`` could have given: within the checkpoint, in one spelling only."""
    return bool(name) and name == os.path.normpath(name) and name != "." and name.split(os.sep)[0] not in ("", "..")


def share_of(names: list[str], part: int, num_parts: int) -> list[str]:
    """What one of several workers takes."""
    return names[part::num_parts]


def entries(checkpoint: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """{path: {"bytes", "sha256"}} of files that have reached the disk when this returns."""
    found = {}
    for name in names:
        path = os.path.join(checkpoint, name)
        sync(path)
        found[name] = {"bytes": os.path.getsize(path), "sha256": checksum(path)}
    return found


def write_manifest(checkpoint: str, files: dict[str, dict[str, Any]], **facts: Any) -> None:
    """The last file of a checkpoint."""
    write_text(os.path.join(checkpoint, MANIFEST), json.dumps({**facts, "files": files}, indent=1))


def read_manifest(checkpoint: str) -> dict[str, Any] | None:
    """None where there is none that can be read."""
    path = os.path.join(checkpoint, MANIFEST)
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            return None
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def faults(checkpoint: str, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with a worker's share of a checkpoint's files; empty if nothing is."""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return [f"{MANIFEST} is missing or unreadable"]
    wrong = []
    if part == 0:
        if os.path.basename(checkpoint) not in (
            name_of(manifest.get("step")),
            f"{name_of(manifest.get('step'))}.partial",
        ):
            wrong.append(f"{MANIFEST} is of step {manifest.get('step')!r}")
        if not manifest["files"]:
            wrong.append(f"{MANIFEST} lists no files")
        unlisted = [name for name in files_in(checkpoint) if name not in manifest["files"]]
        wrong += [f"{name} is not in {MANIFEST}" for name in unlisted]
        outside = [name for name in manifest["files"] if not is_inside(name)]
        wrong += [f"{MANIFEST} names {name!r}, which is no path of a file in it" for name in outside]
    for name in share_of(sorted(filter(is_inside, manifest["files"])), part, num_parts):
        path, expected = os.path.join(checkpoint, name), manifest["files"][name]
        try:
            size = os.path.getsize(path)
            if not os.path.isfile(path):
                wrong.append(f"{name} is no file")
            elif size != expected["bytes"]:
                wrong.append(f"{name} has {size} bytes, not {expected['bytes']}")
            elif checksum(path) != expected["sha256"]:
                wrong.append(f"{name} has another checksum than when it was written")
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except (OSError, KeyError, TypeError) as error:
            wrong.append(f"{name} cannot be read ({error})")
    return wrong


def finish(partial: str, final: str) -> None:
    """Gives a checkpoint whose files and manifest are on the disk its name."""
    for folder, _, _ in os.walk(partial, topdown=False):
        sync(folder)
    os.rename(partial, final)
    sync(os.path.dirname(final))


def point_to(folder: str, step: int, pointer: str = LATEST) -> None:
    """Makes ``folder/latest``, or another pointer, name a checkpoint, for people and for DeepSpeed's tools."""
    write_text(os.path.join(folder, pointer), name_of(step))
    sync(folder)


def pointed_to(folder: str, pointer: str = LATEST) -> int | None:
    """The step that a pointer names; None where it is missing or names none."""
    try:
        with open(os.path.join(folder, pointer), encoding="utf-8") as file:
            match = re.fullmatch(r"step(\d+)", file.read().strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) if match else None


def remove(checkpoint: str) -> None:
    """Takes a checkpoint away. First it loses its name, so that a half-removed one is never taken for a damaged one."""
    removed = f"{checkpoint}.removed"
    os.rename(checkpoint, removed)
    sync(os.path.dirname(checkpoint))
    shutil.rmtree(removed)


def remove_unfinished(folder: str) -> None:
    """Takes away what a killed run has left half-written, half-removed or replaced."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in names:
        match = re.fullmatch(r"(step\d+)\.(partial|removed|damaged)", name)
        if match and (match[2] != "damaged" or match[1] in names):
            shutil.rmtree(os.path.join(folder, name))


def write_text(path: str, text: str) -> None:
    """A small file, whole or not at all."""
    temporary = f"{path}.partial"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync(path: str) -> None:
    """Waits until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
