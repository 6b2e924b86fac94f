"""The house as docs/architecture.md draws it: every module has a floor, and imports point down."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from tests.pages import ROOT, tables

PAGE = ROOT / "docs/architecture.md"
PACKAGE = ROOT / "pmc_fast"
FRONT = "__init__.py"  # resolves names on demand and imports nothing
FLOOR = re.compile(r"^### (\w+)$", re.MULTILINE)


def read_floors():
    """Return floors from the top: name -> files and folders, the oracle apart."""
    text = PAGE.read_text(encoding="utf-8").split("\n## Floors", 1)[1].split("\n## ", 1)[0]
    _, *parts = FLOOR.split(text)
    return {
        name: set(re.findall(r"^\| `([^`]+)` \|", rows, re.MULTILINE))
        for name, rows in zip(parts[::2], parts[1::2], strict=True)
    }


FLOORS = read_floors()
ORACLE = "oracle"
HEIGHT = {name: -i for i, name in enumerate(n for n in FLOORS if n != ORACLE)}
MODULES = {
    path.relative_to(PACKAGE).as_posix(): path
    for folder in (PACKAGE, PACKAGE / "kernels")  # a link, which rglob does not follow everywhere
    for path in folder.rglob("*.py")
}


def floor_of(module):
    """Return the floor of a module: where the page names it, or a package of its __init__.py."""
    name = module.removesuffix("__init__.py") if module != FRONT else module
    return next((floor for floor, named in FLOORS.items() if name in named), None)


def imports(module):
    """Return the modules of the package that one imports, at its head or later, but for its types."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    checked_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    here = ["pmc_fast", *module.split("/")[:-1]]
    found = set()
    for node in ast.walk(tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.Import):
            found |= {resolved(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            found |= {resolved([*base, alias.name]) or resolved(base) for alias in node.names}
    return found - {None, module, FRONT}


def resolved(parts):
    """Return the file of a dotted name, or None if it is no module of this package."""
    if parts[:1] != ["pmc_fast"]:
        return None
    path = "/".join(parts[1:])
    return next((m for m in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if m in MODULES), None)


GRAPH = {module: imports(module) for module in MODULES}


def test_the_page_names_every_module_once():
    homes = [module for floor in FLOORS.values() for module in floor]
    assert len(homes) == len(set(homes))
    missing = sorted(module for module in MODULES if floor_of(module) is None)
    assert not missing, f"give these a row in {PAGE.name}: {missing}"
    gone = [h for h in homes if not (PACKAGE / h).exists()]
    assert not gone, f"{PAGE.name} names what is gone: {gone}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {FRONT}))
def test_imports_point_down(module):
    floor = floor_of(module)
    for imported in sorted(GRAPH[module]):
        below = floor_of(imported)
        assert below != ORACLE, f"{module} imports the oracle"
        if floor == ORACLE:
            assert below in ("data", "ground"), f"the oracle imports {imported}, of floor {below}"
        else:
            assert HEIGHT[below] <= HEIGHT[floor], f"{module} ({floor}) imports {imported} ({below}) above it"


def test_imports_have_no_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_the_front_imports_nothing():
    assert not GRAPH[FRONT]


def test_the_readmes_house_is_the_same():
    (rows,) = [rows for header, rows in tables(ROOT / "README.md") if header[0] == "floor"]
    for name, text in rows:
        for module in re.findall(r"`([\w/]+(?:\.py|/))`", text):
            assert module in FLOORS[name], f"README.md has {module} on floor {name}"


# --- what the page says beside the floors


def holding(pattern, folder, ending="*.py"):
    return {p.relative_to(folder).as_posix() for p in folder.rglob(ending) if re.search(pattern, p.read_text())}


def test_one_module_knows_each_secret():
    assert holding(r"\bAttentionInterface\b", PACKAGE) == {"patching.py"}
    assert holding(r"pmc_fast\._c", PACKAGE) == {"native.py"}
    assert holding(r"import_module\(f?\"\.\.kernels|from \.\.kernels", PACKAGE) == {
        "ops/cuda.py",
        "ops/gather_logps.py",
    }
    csrc = ROOT / "csrc"
    assert all(name.startswith("bindings") for name in holding(r"#include <pybind11", csrc, "*.*"))
    assert not holding(r"#include <(torch|ATen|c10)", csrc, "*.*")


def test_kernels_need_torch_and_triton_alone():
    for module in MODULES:
        if module.startswith("kernels/"):
            assert all(imported.startswith("kernels/") for imported in GRAPH[module]), module
