"""Settings of the whole suite."""

import os

# ranks and launchers inherit these; without a GPU DeepSpeed would ask, and warn, in every process
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for each core

import pathlib
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on the CPU

SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mnist_folder():
    """The folder with MNIST/; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("LARGEBATCH_TEST_DATA", SHARED_DATA))
    if not (folder / "MNIST").is_dir():
        pytest.skip(f"no MNIST under {folder}; set LARGEBATCH_TEST_DATA to a folder that holds MNIST/")
    return str(folder)


@pytest.fixture(scope="session")
def rank_pool():
    """Worker processes in gloo groups of 1 to 4, started when first asked for."""
    from support.rank_pool import RankPool

    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def cifar10_folder(tmp_path_factory):
    """A folder with cifar-10-batches-py/; tests that need it are skipped where there is neither that nor the packed form."""
    folder = pathlib.Path(os.environ.get("LARGEBATCH_TEST_DATA", SHARED_DATA))
    if (folder / "cifar-10-batches-py").is_dir():
        return str(folder)
    unpack = folder / "cifar10-packed" / "unpack.py"
    if not unpack.is_file():
        pytest.skip(f"no CIFAR-10 under {folder}; set LARGEBATCH_TEST_DATA to a folder that holds cifar-10-batches-py/")
    unpacked = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(unpack), str(unpacked)], check=True, stdout=subprocess.DEVNULL)
    return str(unpacked)


@pytest.fixture(scope="session")
def image_folder():
    """A folder with train/ and val/ full of photographs; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("LARGEBATCH_TEST_DATA", SHARED_DATA)) / "imagefolder"
    if not (folder / "train").is_dir():
        pytest.skip(f"no folder {folder}; set LARGEBATCH_TEST_DATA to a folder that holds imagefolder/train and val")
    return str(folder)
