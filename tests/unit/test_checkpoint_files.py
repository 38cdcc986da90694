"""A checkpoint is whole, or it is said what is wrong with it."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.launch.trainer.saving import step_folders

CONTENTS = {"a.pt": b"weights" * 1000, "deep/b.pt": b"", "deep/c.pt": bytes(range(256)) * 40}


def written(folder, step=3):
    checkpoint = folder / step_folders.name_of(step)
    for name, content in CONTENTS.items():
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    step_folders.write_manifest(
        str(checkpoint), step_folders.entries(str(checkpoint), step_folders.files_in(str(checkpoint))), step=step
    )
    return checkpoint


def test_a_whole_one_has_no_faults(tmp_path):
    checkpoint = written(tmp_path)
    assert step_folders.files_in(str(checkpoint)) == sorted(CONTENTS)
    assert step_folders.read_manifest(str(checkpoint))["step"] == 3
    assert step_folders.faults(str(checkpoint)) == []


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_missing_file_is_named_by_exactly_one_worker(tmp_path, name, num_parts):
    checkpoint = written(tmp_path)
    (checkpoint / name).unlink()
    found = [step_folders.faults(str(checkpoint), part, num_parts) for part in range(num_parts)]
    assert [faults for faults in found if faults] == [[f"{name} is missing"]]


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, len(CONTENTS["deep/c.pt"]) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(tmp_path_factory, position, bit):
    checkpoint = written(tmp_path_factory.mktemp("flipped"))
    content = bytearray(CONTENTS["deep/c.pt"])
    content[position] ^= 1 << bit
    (checkpoint / "deep/c.pt").write_bytes(content)
    assert step_folders.faults(str(checkpoint)) == ["deep/c.pt has another checksum than when it was written"]


@settings(max_examples=30, deadline=None)
@given(length=st.integers(0, len(CONTENTS["a.pt"]) - 1))
def test_a_truncated_file_is_found(tmp_path_factory, length):
    checkpoint = written(tmp_path_factory.mktemp("truncated"))
    os.truncate(checkpoint / "a.pt", length)
    assert step_folders.faults(str(checkpoint)) == [f"a.pt has {length} bytes, not 7000"]


@settings(max_examples=60, deadline=None)
@given(text=st.binary(max_size=60))
def test_any_other_manifest_is_a_fault_or_says_nothing_of_the_files(tmp_path_factory, text):
    checkpoint = written(tmp_path_factory.mktemp("manifest"))
    (checkpoint / step_folders.MANIFEST).write_bytes(text)
    assert step_folders.faults(str(checkpoint)) == ["manifest.json is missing or unreadable"]


@pytest.mark.parametrize("entry", [{}, 3, {"bytes": 7000}, {"bytes": 7000, "sha256": None}])
def test_a_manifest_with_broken_entries(tmp_path, entry):
    checkpoint = written(tmp_path)
    manifest = step_folders.read_manifest(str(checkpoint))
    manifest["files"]["a.pt"] = entry
    step_folders.write_manifest(str(checkpoint), manifest["files"], step=3)
    (fault,) = step_folders.faults(str(checkpoint))
    assert fault.startswith("a.pt ")


@pytest.mark.parametrize("name", [step_folders.MANIFEST, "a.pt"])
@pytest.mark.parametrize("target", ["/dev/zero", "/nonexistent", "a pipe", "a folder"])
def test_what_is_no_file_is_a_fault_and_is_not_read(tmp_path, name, target):
    """A pipe would be waited for, a device read for ever."""
    path = written(tmp_path) / name
    path.unlink()
    if target == "a pipe":
        os.mkfifo(path)
    elif target == "a folder":
        path.mkdir()
    else:
        path.symlink_to(target)
    (fault,) = step_folders.faults(str(path.parent))
    assert fault.startswith(name)


def test_a_manifest_of_another_checkpoint(tmp_path):
    checkpoint = written(tmp_path)
    os.rename(checkpoint, tmp_path / "step30")
    assert step_folders.faults(str(tmp_path / "step30")) == ["manifest.json is of step 3"]


def test_files_that_no_manifest_lists(tmp_path):
    """What is not compared with a checksum is not loaded either."""
    checkpoint = written(tmp_path)
    manifest = step_folders.read_manifest(str(checkpoint))
    del manifest["files"]["deep/c.pt"]
    step_folders.write_manifest(str(checkpoint), manifest["files"], step=3)
    assert step_folders.faults(str(checkpoint)) == ["deep/c.pt is not in manifest.json"]
    step_folders.write_manifest(str(checkpoint), {}, step=3)
    assert step_folders.faults(str(checkpoint))[0] == "manifest.json lists no files"


def test_a_small_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError):
        step_folders.write_text(str(tmp_path / "a.json"), "text")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_only_finished_checkpoints_are_listed(tmp_path):
    for step in (5, 20, 100):
        written(tmp_path, step)
    for name in ("step7.partial", "step8.damaged", "stepx", "latest"):
        (tmp_path / name).mkdir()
    assert step_folders.steps_in(str(tmp_path)) == [100, 20, 5]
    step_folders.remove_unfinished(str(tmp_path))
    assert not (tmp_path / "step7.partial").exists() and (tmp_path / "step8.damaged").exists()
    assert step_folders.steps_in(str(tmp_path / "nowhere")) == []


def test_finishing_renames_and_the_pointer_is_replaced_at_once(tmp_path):
    checkpoint = written(tmp_path, 4)
    os.rename(checkpoint, tmp_path / "step4.partial")
    step_folders.finish(str(tmp_path / "step4.partial"), str(tmp_path / "step4"))
    step_folders.point_to(str(tmp_path), 3)
    step_folders.point_to(str(tmp_path), 4)
    assert (tmp_path / "latest").read_text() == "step4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step4"]
    assert step_folders.faults(str(tmp_path / "step4")) == []


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "", ".", "deep/../a.pt", "./a.pt", "deep//c.pt"])
def test_a_manifest_may_only_name_what_is_inside(tmp_path, name):
    """Else a checkpoint would be whole or damaged by what happens to lie elsewhere; or have one file twice."""
    checkpoint = written(tmp_path)
    (tmp_path.parent / "outside").write_bytes(CONTENTS["a.pt"])
    entries = step_folders.entries(str(checkpoint), step_folders.files_in(str(checkpoint)))
    step_folders.write_manifest(str(checkpoint), {**entries, name: entries["a.pt"]}, step=3)
    assert step_folders.faults(str(checkpoint)) == [f"manifest.json names {name!r}, which is no path of a file in it"]
    assert step_folders.faults(str(checkpoint), 1, 2) == []


def test_names_with_two_dots_that_are_inside(tmp_path):
    checkpoint = written(tmp_path)
    (checkpoint / "..a.pt").write_bytes(b"x")
    step_folders.write_manifest(
        str(checkpoint), step_folders.entries(str(checkpoint), step_folders.files_in(str(checkpoint))), step=3
    )
    assert step_folders.faults(str(checkpoint)) == []
