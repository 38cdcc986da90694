"""The Triton kernels' way to a GPU, walked without one: binder, specialisation, compiler; only the launch is a stand-in's.

With the Triton that is installed for A100, and with 3.6 (which came with torch 2.11) for H100. See support/walk_triton.py.
"""

import importlib.metadata
import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import largebatch
from largebatch.kernels import dispatch
from support.backends import OPTION_SETS, name_of

pytest.importorskip("triton", reason="triton is not installed")

SUPPORT = pathlib.Path(__file__).parents[1] / "support"
OTHER_TRITON = "3.6.0"
OTHER_FOLDER = pathlib.Path(sys.prefix) / f"triton-{OTHER_TRITON}"
"""Where launch/test.sh puts it: beside the installed one, not in its place."""

ALGORITHMS = ("lars", "lars2019", "lamb", "nlamb", "nnlamb", "lans")
KINDS = (
    "torch.bfloat16", "torch.float16", "torch.float64", "bf16 state", "partition", "sharded", "scaler", "scaler and clip",
    "lr tensor", "counts",
)  # fmt: skip
CASES = ["probe", *(f"{name_of(o)} {name_of(options)}" for o, options in OPTION_SETS)]
CASES += [f"{algorithm} {kind}" for algorithm in ALGORITHMS for kind in KINDS]


def walk(version, capability, folder):
    """Starts the walk of all cases; see walked."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(SUPPORT.parent)]
    if version == OTHER_TRITON:
        paths.insert(0, str(OTHER_FOLDER))
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-W", "ignore", str(SUPPORT / "walk_triton.py"), str(capability)]
    return subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """{(version, capability): {case: what happened}}"""
    found = {}

    def of(version, capability):
        if (version, capability) not in found:
            process = walk(version, capability, tmp_path_factory.mktemp(f"triton-{version}-{capability}"))
            out, errors = process.communicate(timeout=1800)
            assert process.returncode == 0, errors[-4000:]
            lines = [json.loads(line) for line in out.splitlines()]
            assert lines[0]["triton"] == version
            found[version, capability] = {line["case"]: line for line in lines if "case" in line}
        return found[version, capability]

    return of


@pytest.mark.full
@pytest.mark.parametrize(
    "version, capability",
    [("installed", 80), (OTHER_TRITON, 90)],
    ids=["installed-A100", f"{OTHER_TRITON}-H100"],
)
@pytest.mark.parametrize("case", CASES)
def test_a_step_reaches_the_launch(walks, version, capability, case):
    """Ten steps with new gradient addresses and changed lr, decay, betas and momentum compile nothing after the second."""
    installed = importlib.metadata.version("triton")
    if version == OTHER_TRITON and version != installed and not OTHER_FOLDER.is_dir():
        pytest.skip(
            f"no Triton {version} in {OTHER_FOLDER}; python -m pip install --no-deps --target {OTHER_FOLDER} "
            f"triton=={version} puts it there"
        )
    happened = walks(installed if version == "installed" else version, capability)[case]
    assert happened["error"] is None, happened["error"]
    assert happened["late"] == 0
    wanted = {"probe_kernel"} if case == "probe" else {"first_kernel", "second_kernel"}
    wanted |= {"square_kernel"} if case.startswith("lans") or "and clip" in case or "max_grad_norm" in case else set()
    assert set(happened["kernels"]) == wanted


def test_every_case_is_walked():
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from support.walk_triton import cases; print(*[c for c, _ in cases()], sep='\\n')"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SUPPORT.parent)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.splitlines() == CASES


# --- where it ends early ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.choose.cache_clear()
    yield monkeypatch
    dispatch.choose.cache_clear()


FAULTS = {
    "no C compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore"),
    "no Python headers": subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    "no folder to write to": PermissionError(13, "Permission denied", "/proc/x"),
    "no assembler": OSError("Cannot find ptxas"),
    "no driver": AssertionError("libcuda.so cannot found!"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_that_cannot_be_launched_leave_the_reference(fresh_choice, caplog, fault):
    from largebatch.kernels import triton_gpu

    def fail(device):
        raise FAULTS[fault]

    fresh_choice.setattr(triton_gpu, "probe", fail)
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        assert dispatch.choose("cuda", "auto").name == "reference"
    assert "auto took 'reference' (slower) for cuda tensors, because kernels 'triton' cannot be" in caplog.text
    with pytest.raises(dispatch.UnavailableKernelsError, match="cannot be compiled or launched here") as caught:
        dispatch.choose("cuda", "triton")
    reason = str(FAULTS[fault]).splitlines()[0]
    assert reason in str(caught.value) and "\n" not in str(caught.value) and "python3-dev" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, on which the probe works")
def test_the_probe_really_launches(fresh_choice):
    """Without a device it fails, and that is told, not raised, by "auto"."""
    assert dispatch.choose("cuda", "auto").name == "reference"


def test_an_old_triton_is_told_with_what_to_do(fresh_choice):
    import triton

    fresh_choice.setattr(triton, "__version__", "2.3.1")
    with pytest.raises(dispatch.UnavailableKernelsError, match="need triton 3.2 or newer, and here is 2.3.1"):
        dispatch.choose("cuda", "triton")


def test_a_step_that_cannot_be_launched_is_one_error_for_an_explicit_request(fresh_choice):
    """Not a fallback in the middle of training, and the parameters are left alone."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = largebatch.LAMB([weight], lr=0.1, kernels="triton")
    with pytest.raises(dispatch.UnavailableKernelsError, match="work on cuda tensors, not on cpu ones"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3))
