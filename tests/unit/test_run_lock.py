"""One run at a time in a folder."""

import subprocess
import sys

import pytest

from largebatch.launch.supervise.run_lock import FolderInUseError, hold

HOLDER = """
import sys
from largebatch.launch.supervise.run_lock import hold
lock = hold(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_is_told_who_the_first_is_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"is in use by process {holder.pid} on .*choose another --output"):
        hold(str(tmp_path), seconds=0.3)
    holder.kill()
    holder.communicate()
    hold(str(tmp_path), seconds=30).close()
    hold(str(tmp_path), seconds=0).close()
