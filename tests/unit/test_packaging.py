"""What setup.cfg says against what is on the disk, and what importing does not do."""

import ast
import configparser
import functools
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


LIBRARY = {
    "rules": (),
    "layer_map": (),
    "telemetry": (),
    "presets": (),
    "exclusion": (),
    "config": (),
    "schedule": ("config",),
    "kernels": ("rules", "telemetry"),
    "optim": ("config", "exclusion", "kernels", "layer_map", "presets", "rules", "telemetry"),
    "engine": ("config", "layer_map", "optim", "presets", "schedule"),
    "planning": ("config", "schedule"),
    "models": ("config",),
    "ds_configs": ("schedule",),
}
"""Room -> rooms that it may import; the trainer (launch) and the package itself may import all."""


@functools.cache
def modules():
    """Name of each module of the package -> its path."""
    found = {}
    for package, folder in (
        ("", "plugin"),
        ("models.", "models"),
        ("launch.", "launch"),
        ("ds_configs.", "ds_configs"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found[f"largebatch.{package}{name}".removesuffix(".__init__")] = path
    return found


def imports_of(path):
    """Names of modules, wherever in the file they are imported; "from package import module" is the module's."""
    own = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in own else node.module for name in names)


def room_of(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("room", LIBRARY)
def test_imports_run_one_way(room):
    paths = [path for name, path in modules().items() if room_of(name) == room]
    assert paths
    for path in paths:
        imported = {room_of(name) for name in imports_of(path) if name.startswith("largebatch")} - {"", room}
        assert imported <= {*LIBRARY[room]}, path


def test_one_room_knows_deepspeed():
    for name, path in modules().items():
        if any(imported.partition(".")[0] == "deepspeed" for imported in imports_of(path)):
            assert room_of(name) == "engine", path


def test_no_import_goes_round_in_a_circle():
    """Those inside functions count, too."""
    paths = modules()
    edges = {name: {i for i in imports_of(path) if i in paths and i != name} for name, path in paths.items()}
    while edges:
        leaves = {name for name, imported in edges.items() if not imported & edges.keys()}
        assert leaves, f"each of these imports another of them: {', '.join(sorted(edges))}"
        edges = {name: imported for name, imported in edges.items() if name not in leaves}


def test_layouts_are_integers():
    assert "import torch" not in (ROOT / "plugin/layer_map/segment.py").read_text()
