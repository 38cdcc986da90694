"""Makes a virtual environment in the work folder, without network: the machine's packages, the wheels' and largebatch.

``site/`` gets the wheels' packages. ``alias/largebatch/`` is a folder of links into the repository, laid out as setup.cfg lays
the package out: nothing has to be built, and an edit is in force at once. ``venv/`` finds these two first, and then all that
the Python finds that started this, be it in a virtual environment itself.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import venv

from gpu.report import ROOT, Report, stage_arguments

INNER_PACKAGES = ("models", "launch", "ds_configs")


def install(wheels: pathlib.Path, site: pathlib.Path) -> str:
    """What was done, for people.

    Raises:
        CalledProcessError: pip failed; its output says why.
    """
    files = sorted(wheels.glob("*.whl"))
    stamp = site / "largebatch-wheels.txt"
    wanted = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    if stamp.is_file() and stamp.read_text() == wanted:
        return f"{len(files)} wheels were there already"
    shutil.rmtree(site, ignore_errors=True)
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, files)], check=True
    )
    stamp.write_text(wanted)
    return f"installed {', '.join(path.name for path in files)}"


def link(alias: pathlib.Path) -> None:
    package = alias / "largebatch"
    shutil.rmtree(alias, ignore_errors=True)
    package.mkdir(parents=True)
    inner = [ROOT / name for name in INNER_PACKAGES]
    for path in [*(ROOT / "plugin").iterdir(), *inner]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)


def make_environment(folder: pathlib.Path, first: list[pathlib.Path]) -> str:
    """An environment that finds packages in some folders first, then where this Python does; returns its Python."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = str(folder / "bin" / "python3")
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    machines = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({str(path)!r})\n" for path in [*first, *machines]]
    pathlib.Path(own, "largebatch-gpu.pth").write_text("".join(lines))
    return python


def main() -> int:
    arguments = stage_arguments(__doc__)
    report = Report(arguments)
    report.add("# Setup", "")
    link(arguments.work / "alias")
    if arguments.wheels is None:
        report.add("- no folder of wheels; what the machine has must do")
    else:
        report.add(f"- {install(arguments.wheels, arguments.work / 'site')}")
    python = make_environment(arguments.work / "venv", [arguments.work / "site", arguments.work / "alias"])
    program = (
        "import deepspeed, largebatch, torch; print(deepspeed.__version__, largebatch.__file__, torch.__version__)"
    )
    found = subprocess.run([python, "-c", program], capture_output=True, text=True)
    print(found.stdout, found.stderr)
    report.add(f"- deepspeed, largebatch, torch: {(found.stdout.strip() or 'import failed').splitlines()[-1]}")
    if found.returncode:
        print(found.stderr.strip().splitlines()[-1])
    return found.returncode


if __name__ == "__main__":
    sys.exit(main())
