"""What setup.cfg says against what is on the disk, and what importing does not do."""

import configparser
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import largebatch

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def test_every_package_on_the_disk_is_listed(setup_cfg):
    folders = dict(map(str.strip, line.split("=")) for line in lines(setup_cfg["options"]["package_dir"]))
    found = set()
    for package, folder in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    assert found == set(lines(setup_cfg["options"]["packages"]))


def test_every_folder_with_python_files_is_a_package():
    for top in ("plugin", "models", "launch", "ds_configs"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_a_wheel_holds_everything_that_is_needed_at_run_time(tmp_path):
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)  # a build leaves files behind
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "."], cwd=copy, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("plugin", "largebatch"), ("ds_configs", "largebatch/ds_configs")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".json", ".cpp", ".h", ".inc", ".typed"):
                assert f"{package}/{path.relative_to(ROOT / folder)}" in held


def test_version(setup_cfg):
    assert largebatch.__version__ == setup_cfg["metadata"]["version"]


def test_importing_patches_nothing_and_loads_no_deepspeed():
    code = "import sys, torch; before = set(dir(torch.optim)); import largebatch; assert 'deepspeed' not in sys.modules; assert set(dir(torch.optim)) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_run_one_way():
    """rules know torch alone; kernels know rules; the layer map's integers know neither torch.distributed nor deepspeed."""
    forbidden = {
        "plugin/rules": (
            "largebatch.kernels",
            "largebatch.optim",
            "largebatch.layer_map",
            "largebatch.config",
            "deepspeed",
        ),
        "plugin/kernels": ("largebatch.optim", "largebatch.layer_map", "largebatch.config", "deepspeed", "distributed"),
        "plugin/layer_map": ("largebatch.optim", "largebatch.kernels", "largebatch.rules"),
        "plugin/optim": ("largebatch.register", "import deepspeed"),
        "models": ("largebatch.optim", "largebatch.launch", "deepspeed"),
    }
    for folder, names in forbidden.items():
        for path in (ROOT / folder).rglob("*.py"):
            imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
            assert not [line for line in imports for name in names if name in line], path
    assert "import torch" not in (ROOT / "plugin/layer_map/segment.py").read_text()


def test_ruff():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", str(ROOT)], check=True)
