"""One request to stop, and a second."""

import os
import signal

import pytest

from largebatch.launch.supervise import signals
from largebatch.launch.supervise.signals import SECONDS_OF_ONE_REQUEST, Interruption


class Left(Exception):
    """In place of the end of the process."""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_request_ends_at_once(monkeypatch, capfd, first, second):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    asked = Interruption()
    before = signal.getsignal(signal.SIGTERM)
    with asked.watched():
        assert not asked.is_requested
        os.kill(os.getpid(), first)
        assert asked.is_requested
        os.kill(os.getpid(), second)  # a launcher that passes the same request on
        asked.requested_at -= SECONDS_OF_ONE_REQUEST + 1
        with pytest.raises(Left) as end:
            os.kill(os.getpid(), second)
    assert end.value.args == (128 + second,)
    assert f"a second time ({signal.Signals(second).name}): leaving without a checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
