"""The package is as tests/layers.py and docs/architecture.md draw it: imports point down."""

import re

import pytest

from tests.layers import FRONT, GRAPH, LEVELS, MODULES, ORACLE, PACKAGE, circle, folder_of, upward
from tests.pages import ROOT

PAGE = ROOT / "docs/architecture.md"
# what the oracle may share with what it judges: reading, encoding, loading, the order of rows; no formula
SHARED = re.compile(
    r"(config/.*|errors|data/.*|utils/.*|models/(context|generation)|pmc/(__init__|schedule))\.py|data"
)


def test_every_module_has_a_level_and_a_row():
    levels = {folder for folders in LEVELS for folder in folders} | {FRONT, ORACLE}
    assert {folder_of(m) for m in MODULES} == levels
    text = PAGE.read_text(encoding="utf-8").split("\n## Levels", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([^`]+\.py)` \|", text, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == {m for m in MODULES if m == FRONT or not m.endswith(FRONT)}
    drawn = [tuple(line.split("  ")) for line in text.split("```text\n")[1].split("\n```")[0].splitlines()]
    assert drawn == list(LEVELS)


def test_imports_point_down():
    assert not list(upward())


def test_imports_have_no_circle():
    assert not circle(GRAPH)
    folders: dict[str, set[str]] = {}
    for module, imported in GRAPH.items():
        folders.setdefault(folder_of(module), set()).update(folder_of(m) for m in imported)
    assert not circle({folder: to - {folder} for folder, to in folders.items()})


def test_the_front_imports_nothing():
    assert not GRAPH[FRONT]


def test_the_oracle_shares_no_formula():
    assert all(SHARED.fullmatch(m) for m in GRAPH[ORACLE]), GRAPH[ORACLE]
    assert [m for m in MODULES if ORACLE in GRAPH[m]] == ["bench/contests.py"]  # where it is the baseline


# --- what the page says beside the levels


def holding(pattern, folder, ending="*.py"):
    return {p.relative_to(folder).as_posix() for p in folder.rglob(ending) if re.search(pattern, p.read_text())}


def test_one_module_knows_each_secret():
    assert holding(r"(= |\[)-100\b", PACKAGE) == {"utils/labels.py"}
    assert holding(r"\bAttentionInterface\b", PACKAGE) == {"models/patching.py"}
    assert holding(r"pmc_fast\._c", PACKAGE) == {"ops/native.py"}
    assert holding(r"import_module\(f?\"\.\.kernels|from \.\.kernels", PACKAGE) == {"ops/native.py"}
    csrc = ROOT / "csrc"
    assert all(name.startswith("bindings") for name in holding(r"#include <pybind11", csrc, "*.*"))
    assert not holding(r"#include <(torch|ATen|c10)", csrc, "*.*")


@pytest.mark.parametrize("module", sorted(m for m in MODULES if folder_of(m) == "kernels"))
def test_kernels_need_torch_and_triton_alone(module):
    assert all(folder_of(imported) == "kernels" for imported in GRAPH[module]), GRAPH[module]
