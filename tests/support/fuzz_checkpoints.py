"""Runs of a few steps, and what can happen to their checkpoints before they are resumed."""

import functools
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import tempfile

from largebatch.launch.trainer.saving import step_folders

RUNS = {
    "lars, stage 1": ["lenet_digits_lars_480", "--zero-stage", "1"],
    "lamb, stage 2, bf16": ["lenet_digits_lamb_480", "--zero-stage", "2", "--precision", "bf16"],
    "lamb, stage 3": ["lenet_digits_lamb_480", "--zero-stage", "3"],
    "lars, stage 0": ["lenet_digits_lars_480", "--zero-stage", "0"],
    "sgd, stage 1, bf16": ["lenet_digits_sgd_480", "--zero-stage", "1", "--precision", "bf16"],
}
"""Name -> recipe and settings; on the small MLP, with checkpoints after steps 1 to 3 of 4."""


def arguments_of(name):
    recipe, *settings = RUNS[name]
    return [
        "--deepspeed_config", recipe, "--steps", "4", *settings, "--set", "largebatch.model=mlp", "--set",
        "largebatch.save_every_epochs=0.0334", "--set", "train_batch_size=48", "--set", "train_micro_batch_size_per_gpu=24",
        "--set", "tensorboard.enabled=false", "--set", "zero_optimization.reduce_bucket_size=100000",
    ]  # fmt: skip


@functools.cache
def made(name, run_main):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz_run_"))
    arguments = arguments_of(name)
    seen = run_main([*arguments, "--output", str(folder / "run")], limit=100, seconds=300)
    assert seen.code == 0, (seen.escaped, seen.err)
    return folder / "run", arguments, figures_of(folder / "run")


def trained_run(name, run_main):
    """(folder of the run as it was after its next-to-last step, its command line, its last figures)."""
    run, arguments, figures = made(name, run_main)
    cut = run.parent / "interrupted"
    if not cut.exists():
        shutil.copytree(run, cut)
        newest = max(step_folders.steps_in(str(cut / "checkpoints")))
        shutil.rmtree(cut / "checkpoints" / step_folders.name_of(newest))
        (cut / "checkpoints" / "latest").write_text(step_folders.name_of(newest - 1))
        lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
        (cut / "metrics.jsonl").write_text("".join(lines[:-2]))
    return cut, arguments, figures


def figures_of(run):
    """Losses of all steps, and the last evaluation: the same bits if the training was the same."""
    records = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in records if r["event"] == "step"}
    evaluations = {r["step"]: (r["top1"], r.get("test_loss")) for r in records if r["event"] == "evaluation"}
    return losses, evaluations[max(evaluations)] if evaluations else None


def contents(folder):
    """{path: checksum} of the regular files below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name != "run.lock"
    }


class Payload:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def truncate(rng, path):
    os.truncate(path, rng.randrange(path.stat().st_size or 1))


def flip(rng, path):
    data = bytearray(path.read_bytes()) or bytearray(1)
    for _ in range(rng.choice([1, 1, 10])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def remove(rng, path):
    path.unlink()


def empty(rng, path):
    path.write_bytes(b"")


def grow(rng, path):
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.choice([1, 100])))


def replace_by_folder(rng, path):
    path.unlink()
    path.mkdir()


def replace_by_pipe(rng, path):
    path.unlink()
    os.mkfifo(path)


def replace_by_link(rng, path):
    path.unlink()
    path.symlink_to(rng.choice(["/nonexistent", "/dev/zero", path.name]))


def replace_by_pickle(rng, path):
    path.write_bytes(pickle.dumps(Payload(path.parent / "executed")))


def randomise(rng, path):
    path.write_bytes(rng.randbytes(path.stat().st_size))


FILE_DAMAGES = {
    "truncated": truncate,
    "bits flipped": flip,
    "missing": remove,
    "emptied": empty,
    "grown": grow,
    "a folder": replace_by_folder,
    "a pipe": replace_by_pipe,
    "a link": replace_by_link,
    "another pickle": replace_by_pickle,
    "random bytes": randomise,
}

OTHER_RUNS = [
    ["--set", "optimizer.type=LAMB", "--set", 'optimizer.params={"lr":0.01}'],
    ["--set", "optimizer.type=SGD", "--set", 'optimizer.params={"lr":0.01}'],
    ["--set", "optimizer.type=LARS", "--set", 'optimizer.params={"lr":0.01,"momentum":0.9}'],
    ["--set", "optimizer.type=NLAMB", "--set", 'optimizer.params={"lr":0.01}'],
    ["--set", "largebatch.model=lenet"],
    ["--set", "largebatch.model=lenet", "--set", "largebatch.model_options.dropout=0.1"],
    ["--zero-stage", "0"],
    ["--zero-stage", "1"],
    ["--zero-stage", "3"],
    ["--precision", "bf16"],
    ["--precision", "fp32"],
    ["--set", "train_batch_size=96"],
    ["--steps", "2"],
    ["--seed", "5"],
    ["--set", "optimizer.params.lr=0.5"],
    ["--set", "gradient_clipping=0.1"],
    ["--set", "scheduler.params.power=3"],
    ["--set", 'optimizer.params.exclude_from_adaptation=["bias"]'],
    ["--set", "optimizer.params.state_dtype=bf16"],
    ["--set", 'zero_optimization.offload_optimizer={"device":"cpu"}'],
]


def steps_folder(run, rng):
    checkpoints = run / "checkpoints"
    steps = step_folders.steps_in(str(checkpoints))
    return checkpoints / step_folders.name_of(rng.choice([steps[0], steps[0], *steps]))


def damage(rng, run, whole):
    """Damages a run's folder, or changes what it is resumed with.

    Returns:
        Kinds; words of which an error has one; more arguments; whether the result may be another than the undamaged run's.
    """
    way = rng.choices(["file", "several", "manifest", "layout", "run", "other"], [40, 15, 12, 13, 8, 12])[0]
    if way in ("file", "several"):
        kinds, words = [], []
        for _ in range(1 if way == "file" else rng.randint(2, 12)):
            folder = steps_folder(run, rng)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
            if not files:
                continue
            path, kind = rng.choice(files), rng.choice(list(FILE_DAMAGES))
            FILE_DAMAGES[kind](rng, path)
            kinds.append(f"file {kind}")
            words += [path.name, folder.name]
        return list(dict.fromkeys(kinds)), words, [], False
    if way == "manifest":
        return manifest(rng, steps_folder(run, rng))
    if way == "layout":
        return layout(rng, run)
    if way == "run":
        return of_the_run(rng, run)
    changed = rng.choice(OTHER_RUNS)
    return ["another run's settings"], [*changed, "stage", "model", "optimizer"], changed, True


def manifest(rng, folder):
    path = folder / step_folders.MANIFEST
    content = json.loads(path.read_text())
    name = rng.choice(sorted(content["files"]))
    entry = content["files"][name]
    way = rng.choice(
        [
            "size",
            "checksum",
            "entry",
            "all entries",
            "extra",
            "type",
            "no JSON",
            "outside",
            "damaged with checksum",
            "step",
        ]
    )
    may_differ = False
    if way == "size":
        entry["bytes"] = rng.choice([-1, 0, 10**30, "x", None, 1.5])
    elif way == "checksum":
        entry["sha256"] = rng.choice(["", None, 3, "0" * 64, []])
    elif way == "entry":
        del content["files"][name]
        if rng.random() < 0.5:
            FILE_DAMAGES[rng.choice(["truncated", "bits flipped", "missing", "emptied", "another pickle"])](
                rng, folder / name
            )
    elif way == "all entries":
        content["files"] = {}
    elif way == "extra":
        content["files"]["not_there.pt"] = entry
    elif way == "type":
        content["files"][name] = rng.choice([None, 3, [], "x"])
    elif way == "outside":
        content["files"][rng.choice(["../../metrics.jsonl", "/etc/hostname", "/dev/zero", ""])] = entry
    elif way == "step":
        content["step"], content["world_size"] = rng.choice([[7, 1], ["x", None], [None, 64]])
    elif way == "damaged with checksum":  # as by somebody who wants it so
        FILE_DAMAGES[rng.choice(["truncated", "bits flipped", "emptied", "another pickle", "random bytes"])](
            rng, folder / name
        )
        content["files"][name] = {
            "bytes": (folder / name).stat().st_size,
            "sha256": step_folders.checksum(str(folder / name)),
        }
        may_differ = True
    text = json.dumps(content)
    path.write_text(text[: rng.randrange(len(text))] if way == "no JSON" else text)
    return [f"manifest: {way}"], [name, folder.name, "manifest"], [], may_differ


def layout(rng, run):
    checkpoints = run / "checkpoints"
    folder = steps_folder(run, rng)
    way = rng.choice(
        [
            "latest",
            "latest gone",
            "renamed",
            "foreign folder",
            "swapped files",
            "no checkpoint",
            "partial",
            "huge step",
            "file for folder",
            "swapped steps",
        ]
    )
    words = [folder.name, "latest", "checkpoint"]
    if way == "latest":
        (checkpoints / "latest").write_text(rng.choice(["step999", "", "../..", "\0", "step1\n"]))
    elif way == "latest gone":
        (checkpoints / "latest").unlink()
    elif way == "renamed":
        os.rename(folder, checkpoints / f"step{rng.choice([7, 0, 10**6])}")
        words += ["step7", "step0", "step1000000"]
    elif way == "foreign folder":
        foreign = checkpoints / f"step{rng.choice([9, 10**4])}"
        foreign.mkdir()
        (foreign / "model.safetensors").write_bytes(rng.randbytes(100))
        if rng.random() < 0.5:
            (foreign / step_folders.MANIFEST).write_text(
                rng.choice(["{}", '{"files": {}}', "[]", '{"files": {"model.safetensors": {}}}'])
            )
        words += [foreign.name]
    elif way == "swapped files":
        files = [p for p in sorted(folder.iterdir()) if p.is_file()]
        one, other = rng.sample(files, 2) if len(files) > 1 else (files[0], files[0])
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif way == "no checkpoint":
        shutil.rmtree(checkpoints)
        if rng.random() < 0.5:
            checkpoints.mkdir()
        return ["no checkpoint"], words, [], False
    elif way == "partial":
        shutil.copytree(folder, checkpoints / "step9.partial")
    elif way == "huge step":
        os.rename(folder, checkpoints / f"step{'9' * rng.choice([20, 200])}")
        words += ["999"]
    elif way == "file for folder":
        shutil.rmtree(folder)
        folder.write_text("nothing")
    elif way == "swapped steps":
        steps = sorted(p for p in checkpoints.iterdir() if p.is_dir())
        os.rename(steps[0], checkpoints / "aside")
        os.rename(steps[-1], steps[0])
        os.rename(checkpoints / "aside", steps[-1])
        words += [steps[0].name, steps[-1].name]
    return [f"layout: {way}"], words, [], False


def of_the_run(rng, run):
    """Damage beside the checkpoints."""
    name = rng.choice(["metrics.jsonl", "ds_config.json"])
    kind = rng.choice(["truncated", "bits flipped", "missing", "emptied", "random bytes", "a folder", "a link"])
    FILE_DAMAGES[kind](rng, run / name)
    return [f"{name}: {kind}"], [name], [], True
