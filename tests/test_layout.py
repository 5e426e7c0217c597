"""Modules stay small and imports run one way."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path

import peft_dpzero
import pytest
from peft_dpzero.mechanism.private_sum import PrivateDifferences

PACKAGE = Path(peft_dpzero.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module imports from lower layers or from its own, never from higher ones.
LAYERS = (
    ("errors", "config", "modules"),
    ("perturbation",),
    ("processes", "mechanism", "release", "estimation"),
    ("checks", "public"),
    ("step",),
    ("training",),
    ("auditing",),
    ("cli",),
)
# Within a layer: what a part may import besides itself.
NEIGHBORS = {"estimation": {"mechanism"}, "release": {"mechanism"}}


def part(module: Path) -> str:
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(module: Path) -> set[str]:
    """The parts of the package that `module` imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} if node.module != "peft_dpzero" else {f"peft_dpzero.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("peft_dpzero.")} - {part(module)}


def layer(name: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_small_and_imports_no_higher_layer(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 350
    own = part(module)
    if module.parent == PACKAGE and own == "__init__":
        return
    for other in imported_parts(module):
        assert layer(other) <= layer(own), f"{own} imports {other}"
        if own in ("mechanism", "release", "estimation") and layer(other) == layer(own):
            assert other in NEIGHBORS.get(own, set()), f"{own} imports {other}"


def test_only_the_mechanism_opens_private_differences() -> None:
    sealed = {field.name for field in dataclasses.fields(PrivateDifferences)}
    assert all(name.startswith("_") for name in sealed)
    for module in MODULES:
        if part(module) != "mechanism":
            opened = [n for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.Attribute)]
            assert not any(node.attr in sealed for node in opened if not _is_self(node)), module


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "integrations"])
def test_programs_import_what_is_there(folder: str) -> None:
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_dpzero"):
                module = importlib.import_module(str(node.module))
                for name in (alias.name for alias in node.names):
                    there = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
                    assert there, f"{path.name}: {node.module}.{name}"


def test_the_package_opens_onto_few_rooms() -> None:
    rooms = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert sum(path.suffix == ".py" for path in rooms) <= 8
    assert sum(path.is_dir() for path in rooms) <= 9


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"
