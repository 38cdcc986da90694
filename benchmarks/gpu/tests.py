"""The tests of the kernels on the GPU, in several processes, because most of their time goes into compiling.

``-W default``: a warning of a package that is newer here than where the suite is kept clean ends no test. Only what needs a
GPU is chosen. A rehearsal runs the tests of the path to the launch, which need none.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import pathlib
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree

from gpu.report import ROOT, VERDICT, Report, stage_arguments

NUM_PROCESSES = 8
SECONDS_TO_STOP = 12
"""Before the stage's end pytest is asked to stop, and reports what it has."""

NEED_A_GPU = "triton or gpu or apex"
NEED_NONE = ("test_triton_compiles.py", "test_launch_path.py", "test_device_waits.py")
"""They compile for cards that are not there, or pretend one."""


def main() -> int:
    arguments = stage_arguments(__doc__)
    report = Report(arguments)
    report.add("# Tests of the kernels", "")
    folder = ROOT / "tests" / "kernels"
    if arguments.rehearse:
        chosen = [str(folder / "test_launch_path.py")]
        if not (folder / "test_launch_path.py").is_file():
            report.add("There is no tests/kernels/test_launch_path.py, and without a GPU nothing else to run here.")
            return 0
    else:
        # those of the GPU alone begin first
        chosen = [str(folder / "test_gpu.py"), str(folder), "-k", NEED_A_GPU]
        chosen += [f"--ignore={folder / name}" for name in NEED_NONE]
    junit = arguments.results / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "default"]
    command += ["--tb=short", "-v", f"--junitxml={junit}"]
    if importlib.util.find_spec("xdist") is not None and not arguments.rehearse:
        command += ["-n", str(NUM_PROCESSES)]
    verdict = arguments.results / VERDICT
    verdict.write_text("not at their end")
    process = subprocess.Popen([*command, *chosen], cwd=ROOT)
    try:
        process.wait(report.left - SECONDS_TO_STOP)
        ending = ""
    except subprocess.TimeoutExpired:
        ending = "stopped before their end: "
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_STOP - 2)
    if process.poll() is None:
        process.kill()
    text, lines = read(junit) if junit.is_file() else count(arguments.results / "log.txt")
    verdict.write_text(ending + text)
    report.add(
        f"`pytest {' '.join(command[3:-1] + chosen).replace(str(ROOT) + '/', '')}`", "", ending + text, "", *lines
    )
    print(ending + text)
    return 0 if process.returncode == 0 else 1


def count(log: pathlib.Path) -> tuple[str, list[str]]:
    """As :func:`read`, from what pytest printed of each test; it was killed before it could write its results."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "::" in line]
    words = [re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line) for line in lines]
    counts = collections.Counter(word[1].lower() for word in words if word)
    failed = [f"- {line}" for line, word in zip(lines, words, strict=True) if word and word[1] in ("FAILED", "ERROR")]
    return ", ".join(f"{number} {kind}" for kind, number in counts.items()) or "no test", failed


def read(junit: pathlib.Path) -> tuple[str, list[str]]:
    """The counts of a run, and a line for each test that did not pass."""
    counts, lines = dict.fromkeys(("passed", "failed", "error", "skipped"), 0), []
    for case in xml.etree.ElementTree.parse(junit).iter("testcase"):
        kind, said = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                kind = {"failure": "failed"}.get(child.tag, child.tag)
                said = (child.get("message") or "").strip().splitlines()[:1]
        counts[kind] += 1
        if kind != "passed":
            lines.append(f"- {kind}: {case.get('classname')}::{case.get('name')}: {''.join(said)[:300]}")
    order = {"- failed": 0, "- error": 1, "- skippe": 2}
    lines.sort(key=lambda line: order[line[:8]])
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no test", lines


if __name__ == "__main__":
    sys.exit(main())
