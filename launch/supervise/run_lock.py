"""One run at a time writes into a folder.

filelock holds the same lock of the system, which goes with the process however that ends. What it does not have is the line that
says who holds it, and for that the file has to be ours anyway.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from typing import IO

SECONDS_TO_WAIT = 30.0
"""For the ranks of a run that was killed, which may be saving."""


class FolderInUseError(RuntimeError):
    """Another run is at work in the folder."""


def hold(folder: str, seconds: float = SECONDS_TO_WAIT) -> IO[str]:
    """Holds ``folder/run.lock`` until the file is closed or the process ends, however it ends.

    Raises:
        FolderInUseError: another process holds it, and still does after so many seconds.
        ValueError: the folder cannot be written.
    """
    path = os.path.join(folder, "run.lock")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output {folder!r} cannot be written: {error}") from None
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise FolderInUseError(
                    f"{folder!r} is in use by {holder}; wait for it, end it, or choose another --output"
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
