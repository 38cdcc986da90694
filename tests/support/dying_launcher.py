"""A stand-in for the deepspeed launcher and its ranks: ends in another way at each start. Used by test_run_command.py.

    python dying_launcher.py FOLDER END,END,... --output OUTPUT

Each start takes the next END (the last again and again): code:N, killed, orphan, hang, step (a step, then code 1), done.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ORPHAN = """
import os, pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("saved")
    os._exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(600)
"""


def tell(folder, **record):
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def main():
    state, ends = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
    output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
    output.mkdir(exist_ok=True)
    starts = state / "starts"
    number = len(starts.read_text().splitlines()) if starts.exists() else 0
    with open(starts, "a", encoding="utf-8") as file:
        file.write(" ".join(sys.argv[5:]) + "\n")
    end = ends[min(number, len(ends) - 1)]
    if end.startswith("code:"):
        sys.exit(int(end[5:]))
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end in ("hang", "orphan"):
        mark = state / end
        subprocess.Popen([sys.executable, "-c", ORPHAN, str(mark)], env=os.environ | {"LOCAL_RANK": "0"})
        while not mark.exists():
            time.sleep(0.01)
        if end == "orphan":
            sys.exit(0)
        time.sleep(600)
    if end == "step":
        tell(output, event="step", step=number + 1)
        sys.exit(1)
    tell(output, event="end", step=9)


if __name__ == "__main__":
    main()
