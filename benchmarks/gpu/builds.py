"""Compiles what later stages need, all at once and in the background: our C++ kernels, DeepSpeed's CUDA optimizers, apex.

``builds.json`` says of each whether it is there. apex is compiled from a checkout that the user has put beside; its module
``amp_C`` is left in ``apex/`` of the work folder, and the test of largebatch's apex kernels runs on it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from gpu.report import ROOT, Report, stage_arguments

RESULT = "builds.json"
APEX_MODULE, APEX_VERDICT = "amp_C", "apex_test.txt"


def cpp(arguments) -> None:
    from largebatch.kernels.build import cpu_kernels

    cpu_kernels()


def fused_lamb(arguments) -> None:
    from deepspeed.ops.op_builder import FusedLambBuilder

    FusedLambBuilder().load(verbose=True)


def fused_adam(arguments) -> None:
    from deepspeed.ops.op_builder import FusedAdamBuilder

    FusedAdamBuilder().load(verbose=True)


def apex(arguments) -> None:
    """Takes a compiled module that lies in the checkout, or compiles one; then tests it."""
    folder = arguments.work / "apex"
    folder.mkdir(exist_ok=True)
    for compiled in arguments.apex.glob(f"{APEX_MODULE}*.so"):
        shutil.copyfile(compiled, folder / compiled.name)
    if not list(folder.glob(f"{APEX_MODULE}*.so")):
        compile_apex(arguments.apex / "csrc", folder)
    paths = [str(folder), str(arguments.apex), os.environ.get("PYTHONPATH", "")]
    test = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", "-k", "real_apex"]
    test += [str(ROOT / "tests" / "kernels" / "test_gpu.py")]
    done = subprocess.run(test, env=os.environ | {"PYTHONPATH": ":".join(paths)}, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    (arguments.results / APEX_VERDICT).write_text(done.stdout.strip().splitlines()[-1].strip("= "))


def compile_apex(sources: pathlib.Path, folder: pathlib.Path) -> None:
    from torch.utils import cpp_extension

    files = [sources / "amp_C_frontend.cpp", *sources.glob("multi_tensor_*.cu"), *sources.glob("update_scale_*.cu")]
    cpp_extension.load(
        name=APEX_MODULE,
        sources=[str(path) for path in files],
        extra_cflags=["-O3"],
        extra_cuda_cflags=["-O3", "--use_fast_math"],
        build_directory=str(folder),
        verbose=True,
    )


BUILDS = {
    "largebatch cpp": cpp,
    "DeepSpeed FusedLamb": fused_lamb,
    "DeepSpeed FusedAdam": fused_adam,
    "apex FusedLAMB": apex,
}


def add_headers() -> None:
    """Makes the compiler find the headers that torch's own packages bring, where the toolkit lacks some that torch includes."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME and not (pathlib.Path(CUDA_HOME) / "include" / "cusparse.h").exists():
        spec = importlib.util.find_spec("nvidia")
        roots = list(spec.submodule_search_locations or []) if spec else []
        folders = [str(path) for root in roots for path in pathlib.Path(root).glob("cu*/include")]
        os.environ["CPATH"] = ":".join([*folders, os.environ.get("CPATH", "")]).strip(":")


def usable(results: pathlib.Path) -> dict[str, str]:
    """name -> "" if it is there, or why it is not; from the folder of a stage beside this one."""
    path = results.parent / "builds" / RESULT
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {name: found.get(name, "was not compiled in time") for name in BUILDS}


def main() -> int:
    arguments = stage_arguments(__doc__, only="")
    if arguments.only:
        add_headers()
        BUILDS[arguments.only](arguments)
        return 0
    report = Report(arguments)
    report.add("# Compiled in the background", "")
    for folder in ("extensions", "apex"):
        for lock in (arguments.work / folder).glob("**/lock"):  # of a build that was killed: torch would wait for it
            lock.unlink()
    outcomes: dict[str, str] = {}
    running: dict[str, subprocess.Popen] = {}
    for name in BUILDS:
        reason = "needs a GPU" if arguments.rehearse and name != "largebatch cpp" else ""
        if name == "apex FusedLAMB" and arguments.apex is None:
            reason = "there is no checkout of it (--apex)"
        if reason:
            outcomes[name] = reason
            report.add(f"- {name}: {reason}")
            continue
        command = [sys.executable, "-m", "gpu.builds", "--only", name, "--results", str(arguments.results)]
        command += ["--work", str(arguments.work)] + (["--apex", str(arguments.apex)] if arguments.apex else [])
        with open(arguments.results / f"{name.replace(' ', '_')}.txt", "wb") as log:
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    began = time.monotonic()
    while running:
        time.sleep(0.2)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                outcomes[name] = (
                    "" if process.returncode == 0 else f"could not be compiled (exit code {process.returncode})"
                )
                report.add(f"- {name}: {outcomes[name] or 'compiled'}, {time.monotonic() - began:.0f} s")
                (arguments.results / RESULT).write_text(json.dumps(outcomes))
    (arguments.results / RESULT).write_text(json.dumps(outcomes))
    verdict = arguments.results / APEX_VERDICT
    if verdict.is_file():
        report.add(f'- the test of largebatch\'s `kernels="apex"`: {verdict.read_text()}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
