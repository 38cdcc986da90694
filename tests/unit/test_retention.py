"""Which checkpoints stay, and what a kill while one is removed leaves."""

import math
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.launch.trainer.saving import step_folders
from largebatch.launch.trainer.saving.retention import BEST, Retention


def written(folder, step, **metrics):
    """A whole checkpoint, which ``latest`` names from then on."""
    checkpoint = folder / step_folders.name_of(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.pt").write_bytes(b"weights")
    found = step_folders.entries(str(checkpoint), step_folders.files_in(str(checkpoint)))
    step_folders.write_manifest(str(checkpoint), found, step=step, metrics=metrics)
    step_folders.point_to(str(folder), step)
    return checkpoint


def kept_after(folder, retention, history):
    """Steps that are there once all of a history were saved, one after the other."""
    for step, metrics in history:
        written(folder, step, **metrics)
        retention.apply(str(folder), step)
    return step_folders.steps_in(str(folder))


def test_all_are_kept_by_default(tmp_path):
    assert kept_after(tmp_path, Retention(), [(s, {}) for s in (1, 2, 3)]) == [3, 2, 1]


@pytest.mark.parametrize("last, kept", [(1, [4]), (2, [4, 3]), (9, [4, 3, 2, 1])])
def test_the_last_few(tmp_path, last, kept):
    assert kept_after(tmp_path, Retention(last), [(s, {}) for s in (1, 2, 3, 4)]) == kept


def test_the_best_is_named_and_kept(tmp_path):
    accuracies = [(1, {"top1": 0.5}), (2, {"top1": 0.9}), (3, {"top1": 0.9}), (4, {"top1": 0.7}), (5, {})]
    assert kept_after(tmp_path, Retention(1, "top1"), accuracies) == [5, 2], "of two equals the earlier is the best"
    assert step_folders.pointed_to(str(tmp_path), BEST) == 2 and step_folders.pointed_to(str(tmp_path)) == 5


def test_of_losses_the_lowest_is_the_best(tmp_path):
    losses = [(1, {"test_loss": 0.5}), (2, {"test_loss": 0.1}), (3, {"test_loss": math.nan}), (4, {"test_loss": 0.2})]
    assert kept_after(tmp_path, Retention(1, "test_loss"), losses) == [4, 2]


def test_without_a_figure_there_is_no_best(tmp_path):
    assert kept_after(tmp_path, Retention(1, "top1"), [(1, {}), (2, {"top1": math.nan})]) == [2]
    assert step_folders.pointed_to(str(tmp_path), BEST) is None


def test_later_steps_are_not_touched_and_do_not_count(tmp_path):
    """A run that passed over a damaged step 9 and went on from 2."""
    shutil.rmtree(written(tmp_path, 9, top1=1.0) / "weights.pt", ignore_errors=True)
    assert kept_after(tmp_path, Retention(1, "top1"), [(2, {"top1": 0.5}), (3, {"top1": 0.4})]) == [9, 3, 2]
    assert step_folders.pointed_to(str(tmp_path), BEST) == 2


@settings(max_examples=25, deadline=None)
@given(
    metrics=st.lists(st.one_of(st.none(), st.floats(allow_infinity=False)), min_size=1, max_size=8),
    last=st.integers(1, 4),
    name=st.sampled_from(["top1", "test_loss"]),
)
def test_what_is_always_true(tmp_path_factory, metrics, last, name):
    folder = tmp_path_factory.mktemp("kept")
    history = [(step, {} if value is None else {name: value}) for step, value in enumerate(metrics)]
    kept = kept_after(folder, Retention(last, name), history)
    assert kept[:last] == list(range(len(metrics)))[::-1][:last]
    known = [value for value in metrics if value is not None and not math.isnan(value)]
    if known:
        wanted = metrics.index(min(known) if name == "test_loss" else max(known))
        assert step_folders.pointed_to(str(folder), BEST) == wanted and wanted in kept
    assert len(kept) <= last + 1
    assert all(not step_folders.faults(str(folder / step_folders.name_of(step))) for step in kept)


def test_a_kill_while_removing_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    written(tmp_path, 1)
    written(tmp_path, 2)

    def killed(path):
        os.unlink(os.path.join(path, "weights.pt"))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        Retention(1).apply(str(tmp_path), 2)
    monkeypatch.undo()
    assert step_folders.steps_in(str(tmp_path)) == [2], "what is left of step 1 is not taken for a checkpoint"
    step_folders.remove_unfinished(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step2"]


@pytest.mark.parametrize("text", [None, "", "step", "global_step3", "step3/.."])
def test_a_pointer_that_names_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / "latest").write_text(text)
    assert step_folders.pointed_to(str(tmp_path)) is None


def test_metrics_of_an_earlier_version(tmp_path):
    """Its manifests call them figures."""
    written(tmp_path, 1, top1=0.5)
    manifest = tmp_path / "step1" / step_folders.MANIFEST
    manifest.write_text(manifest.read_text().replace('"metrics"', '"figures"'))
    assert Retention(metric="top1").best(str(tmp_path), 1) == (1, 0.5)
