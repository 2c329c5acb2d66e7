"""The structure of the package: rooms of several modules, short files, unique class names, visible imports."""

import ast
from collections import defaultdict

import pytest
from support import ROOT

EXTENSIONS = ROOT / "extensions"
ROOMS = sorted(path for path in EXTENSIONS.iterdir() if (path / "__init__.py").exists())
MODULES = sorted(EXTENSIONS.rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def named(path):
    return str(path.relative_to(ROOT))


def test_rooms_are_few_and_have_several_modules():
    assert len(ROOMS) <= 20
    for room in ROOMS:
        assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) >= 2, named(room)
    assert [path.name for path in EXTENSIONS.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize(("files", "most"), [(MODULES, 450), (TEST_FILES, 520)], ids=["modules", "tests"])
def test_no_file_is_long(files, most):
    sizes = {named(path): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {path: size for path, size in sizes.items() if size > most} == {}


def test_class_names_are_unique():
    found = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(named(path))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_no_import_is_hidden_from_import_linter():
    """Modules of the project are imported by statements, which the contracts see, not by their names in strings."""
    hidden = [
        f"{named(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
        and any("extensions" in ast.unparse(argument) for argument in node.args)
    ]
    assert hidden == []
