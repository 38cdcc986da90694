"""What setup.cfg says against what is on the disk, and what importing does not do."""

import ast
import collections
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


ROOMS = {
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
    "launch.supervise": (),
    "launch.data": ("config", "models"),
    "launch.recipe": ("config", "ds_configs", "engine", "launch.data", "models", "optim", "schedule"),
    "launch.trainer": (
        "config", "engine", "exclusion", "kernels", "launch.data", "launch.recipe", "launch.supervise", "models", "optim",
        "telemetry",
    ),
    "launch.sizing": ("engine", "launch.data", "launch.recipe", "launch.trainer", "models", "planning", "schedule"),
    "launch.study": ("config", "launch.recipe", "launch.supervise"),
    "launch.doctor": ("kernels", "launch.trainer"),
    "launch.commands": (
        "", "config", "ds_configs", "engine", "launch.data", "launch.doctor", "launch.recipe", "launch.sizing", "launch.study",
        "launch.supervise", "launch.trainer", "planning", "schedule",
    ),
    "launch": ("launch.trainer",),
    "": ("config", "engine", "exclusion", "optim", "rules"),
}  # fmt: skip
"""Room -> rooms that it may import, each of which stands above it; "" is the package's own top, ``largebatch`` as users import it."""

SHARED_NAMES = {
    "bert": "the model and its table of recipes",
    "lamb": "the rule and the optimizer",
    "lans": "the rule and the optimizer",
    "lars": "the rule and the optimizer",
    "plan": "of an optimizer's step, and the command that users know by this name",
}
"""Names that more than one module has, and why."""


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
    """The first folder or file below the package; below launch/ its folders, and "launch" for what lies at its top."""
    first, _, rest = module.partition(".")[2].partition(".")
    if first == "launch" and (ROOT / "launch" / rest.partition(".")[0] / "__init__.py").exists() and rest:
        return f"launch.{rest.partition('.')[0]}"
    return first.removesuffix("__main__")


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    paths = [path for name, path in modules().items() if room_of(name) == room]
    assert paths
    for path in paths:
        imported = {room_of(name) for name in imports_of(path) if name.partition(".")[0] == "largebatch"} - {room}
        assert imported <= {*ROOMS[room]}, path


def test_the_rooms_are_all_there_are_and_no_circle():
    assert {room_of(name) for name in modules()} == ROOMS.keys()
    above = set()
    for room, imported in ROOMS.items():
        if room != "launch.commands":  # imports the package as users do
            assert {*imported} <= above, room
        above.add(room)


def test_no_two_modules_have_one_name():
    """So that a name in a message, an import or an editor's tab says where one is; commands are called as what they start."""
    names = collections.Counter(
        name.rpartition(".")[2]
        for name in modules()
        if not name.endswith(("__main__", "launch.commands.doctor", "launch.commands.study"))
    )
    assert {name for name, count in names.items() if count > 1} == SHARED_NAMES.keys()


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests"])
def test_others_import_modules_that_are_there(folder):
    """Some of them run on machines that these tests do not see."""
    for path in (ROOT / folder).rglob("*.py"):
        assert not {i for i in imports_of(path) if i.startswith("largebatch") and i not in modules()} - {
            "largebatch"
        }, path


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
