"""Brings a part of packed CIFAR-10 onto the machine's own disk, and checks the whole once all parts have come.

The packed form is one folder, of which a part is a folder too: for some of the six batches ``<batch>/*.webp`` and
``<batch>.frame.xz``, perhaps ``batches.meta``, and always the ``unpack.py`` that comes with it. Original Python batches
(``cifar-10-batches-py/``) are taken as they are. Every file is checked against the MD5 that torchvision knows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
import shutil
import sys

from gpu.report import Report, stage_arguments

FOLDER = "cifar-10-batches-py"


def checksums() -> dict[str, str]:
    """File -> MD5 of the seven files that make CIFAR-10."""
    from torchvision.datasets import CIFAR10

    return dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])


def missing_from(work: pathlib.Path) -> list[str]:
    """The files that are not in the work folder as they should be."""
    folder = data_folder(work) / FOLDER
    return [name for name, md5 in checksums().items() if not is_right(folder / name, md5)]


def data_folder(work: pathlib.Path) -> pathlib.Path:
    """What launch/train.py takes as --data."""
    return work / "data"


def is_right(path: pathlib.Path, md5: str) -> bool:
    return path.is_file() and hashlib.md5(path.read_bytes()).hexdigest() == md5


def bring(part: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Unpacks or copies what lies in the part; returns the names of the files."""
    target.mkdir(parents=True, exist_ok=True)
    unpack = unpacker(part)
    brought = []
    for name, md5 in checksums().items():
        plain = next((path for path in (part / FOLDER / name, part / name) if path.is_file()), None)
        if is_right(target / name, md5):
            continue
        if plain is not None:
            shutil.copyfile(plain, target / name)
        elif (part / f"{name}.frame.xz").is_file() and unpack is not None:
            (target / name).write_bytes(unpack.batch_bytes(name))
        else:
            continue
        brought.append(name)
    return brought


def unpacker(part: pathlib.Path):
    """The part's own unpack.py as a module; None if it has none."""
    path = part / "unpack.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("unpack", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    arguments = stage_arguments(__doc__)
    report = Report(arguments)
    report.add("# CIFAR-10", "")
    if arguments.data is None:
        report.add("No folder was given (--data).")
    else:
        brought = bring(arguments.data, data_folder(arguments.work) / FOLDER)
        report.add(f"- from {arguments.data.name}: {', '.join(brought) or 'nothing that was not there'}")
    missing = missing_from(arguments.work)
    report.add(
        f"- still missing, or with a wrong MD5: {', '.join(missing)}" if missing else "- all seven files are right"
    )
    if missing and arguments.data is None:
        print("no --data, and the set is not whole")
    return int(bool(missing) and arguments.data is None)


if __name__ == "__main__":
    sys.exit(main())
