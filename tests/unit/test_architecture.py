"""docs/architecture.md names rooms, files and functions that are there, and every room."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
PLACES = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", TEXT)))


@pytest.mark.parametrize("path, name", PLACES)
def test_functions_are_where_it_says(path, name):
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_files_are_there():
    named = set(re.findall(r"`((?:plugin|models|launch|ds_configs|tests|docs)/[\w/]*[\w.]*)`", TEXT))
    assert len(named) > 30
    assert not {path for path in named if not (ROOT / path).exists()}


def test_no_function_comes_twice_in_the_walks():
    walks = TEXT[TEXT.index("## The walk of a ds_config") : TEXT.index("## Where to add")]
    places = re.findall(r"`[\w/]+\.py:\w+`", walks)
    assert len(places) > 40 and len(places) == len(set(places))


def test_every_room_has_its_sentence():
    rooms = {
        path.parent.relative_to(ROOT) for top in ("plugin", "launch") for path in (ROOT / top).rglob("__init__.py")
    }
    for room in rooms - {pathlib.Path("plugin"), pathlib.Path("launch")}:
        assert re.search(rf"^\| `{room}/` \|.*\.\s\|$", TEXT, re.MULTILINE), room
