"""The papers' systems through the time model."""

import pytest

from largebatch.planning import published

COMPARED = {c.run.name: c for c in published.comparisons()}


def test_no_row_is_fitted_to_itself():
    """Only rows that are marked give a throughput; the others' come from a marked row of another size, or from outside."""
    for c in COMPARED.values():
        assert c.run.calibrates == (abs(c.error) < 1e-9), c.run.name
    calibrating = [run for run in published.RUNS if run.calibrates]
    assert len({run.rate for run in calibrating}) == len(calibrating) and not published.MEASURED.keys() & {
        run.rate for run in calibrating
    }
    assert published.rates().keys() == {run.rate for run in published.RUNS}


def test_authors_run_of_resnet50_by_hand():
    """3,519 steps of 32,768 images on 128 chips of 1.05e6 / 1,024 images/s, and 2 * 127 messages of 102 MB / 128 a step."""
    computing = 3519 * 32768 / 128 / (1_050_000 / 1024)
    waiting = 3519 * 2 * 127 * (1e-6 + 4 * 25_557_032 / 128 / 83e9)
    assert COMPARED["ResNet-50 LAMB, 3,519 steps, 128 TPUv3"].predicted_minutes == pytest.approx(
        (computing + waiting) / 60
    )


def test_bert_has_the_same_work_at_every_batch():
    """All rows of the paper's table train on 512 million sequences, a tenth of them long."""
    works = [
        sum(p.num_steps * p.global_batch * p.work for p in run.phases)
        for run in published.RUNS
        if run.rate == "TPUv3 BERT"
    ]
    assert len(works) == 8 and max(works) / min(works) < 1.001


def test_every_prediction_is_within_half_of_the_published_time():
    """A bound on the model, not a fit: the figures themselves are in docs/planning.md."""
    assert all(abs(c.error) < 0.51 for c in COMPARED.values())


def test_communication_overtakes_where_the_extrapolation_says():
    run = next(r for r in published.RUNS if r.name == "AlexNet, 100 epochs, 512 KNL")
    count = published.crossover(run)
    before, at = published.extrapolate(run, [count // 2, count])
    assert before.efficiency > 0.5 > at.efficiency
    assert published.extrapolate(run, [65536])[0].minutes is None  # half an image a worker
