"""Images a second: what counts."""

from largebatch.launch.trainer import step_reports
from largebatch.launch.trainer.step_reports import Speed


def test_the_first_step_counts_only_if_it_is_the_only_one(monkeypatch):
    """Ten seconds with compiling, an evaluation of a hundred, then two steps of one second."""
    clock = [0.0]
    monkeypatch.setattr(step_reports.time, "perf_counter", lambda: clock[0])
    speed = Speed(last=0.0)
    clock[0] = 10.0
    assert speed.count(40) == 10.0 and speed.samples_per_second == 4.0
    clock[0] = 110.0
    speed.restart()
    for clock[0] in (111.0, 112.0):
        assert speed.count(40) == 1.0
    assert speed.samples_per_second == 40.0
