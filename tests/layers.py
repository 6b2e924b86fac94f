"""The package's import picture, `python -m tests.layers`: levels, arrows between folders, circles, lines of code.

`tests/test_layers.py` holds the code to LEVELS. `--modules` prints each module's own imports too.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pmc_fast"
FRONT = "__init__.py"  # resolves names on demand and imports nothing
ORACLE = "reference.py"  # the published algorithm, beside the levels: only what measures against it imports it

# from the top; what stands in one line does not import each other
LEVELS = (
    ("__main__.py",),
    ("cli",),
    ("erasure", "bench"),
    ("jobs", "integrations"),
    ("trainer", "evaluation", "report"),
    ("methods",),
    ("pmc",),
    ("rollout",),
    ("models",),
    ("cuda_graphs",),
    ("data", "ops"),
    ("config", "distributed.py", "kernels"),
    ("utils",),
    ("errors.py",),
)
LEVEL = {folder: -i for i, folders in enumerate(LEVELS) for folder in folders}

MODULES = {
    path.relative_to(PACKAGE).as_posix(): path
    for folder in (PACKAGE, PACKAGE / "kernels")  # a link, which rglob does not follow everywhere
    for path in sorted(folder.rglob("*.py"))
}


def folder_of(module: str) -> str:
    """Return the part of a path that has a level: its first folder, or a module of the root itself."""
    return module.split("/")[0]


def imports(module: str) -> set[str]:
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
    return {m for m in found if m and m not in (module, FRONT)}


def resolved(parts: list[str]) -> str | None:
    """Return the file of a dotted name, or None if it is no module of this package."""
    if parts[:1] != ["pmc_fast"]:
        return None
    path = "/".join(parts[1:])
    return next((m for m in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if m in MODULES), None)


GRAPH = {module: imports(module) for module in MODULES}


def upward() -> Iterator[tuple[str, str]]:
    """Yield the imports that do not lead into the same folder or to a lower level."""
    for module, imported in GRAPH.items():
        for other in sorted(imported):
            above, below = folder_of(module), folder_of(other)
            if ORACLE in (above, below) or above == below:
                continue
            if LEVEL[below] >= LEVEL[above]:
                yield module, other


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of a graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def depth(graph: dict[str, set[str]]) -> int:
    """Return how many modules stand one upon another."""
    heights: dict[str, int] = {}
    for module in TopologicalSorter(graph).static_order():
        heights[module] = 1 + max((heights[m] for m in graph[module]), default=0)
    return max(heights.values())


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def longest_function() -> tuple[int, str]:
    """Return the lines of the package's longest function, and its name."""
    return max(
        (node.end_lineno - node.lineno + 1, f"{module}: {node.name}")
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    )


def main() -> None:
    """Print the picture."""
    lines, files = Counter[str](), Counter[str]()
    for module, path in MODULES.items():
        lines[folder_of(module)] += lines_of(path)
        files[folder_of(module)] += 1
    arrows: dict[str, set[str]] = {}
    for module, imported in GRAPH.items():
        arrows.setdefault(folder_of(module), set()).update(folder_of(m) for m in imported)
    for folders in LEVELS:
        for folder in folders:
            to = sorted(arrows.get(folder, set()) - {folder}, key=lambda f: -LEVEL.get(f, 0))
            print(f"{folder:16} {files[folder]:3} files {lines[folder]:6} lines   -> {' '.join(to)}")
        print()
    csrc = [p for p in (ROOT / "csrc").iterdir() if p.suffix in (".cpp", ".h", ".cu")]
    print(f"{'csrc':16} {len(csrc):3} files {sum(map(lines_of, csrc)):6} lines")
    print(f"{ORACLE:16} {files[ORACLE]:3} files {lines[ORACLE]:6} lines   beside the levels")
    print(f"{'all':16} {len(MODULES) + len(csrc):3} files {sum(lines.values()) + sum(map(lines_of, csrc)):6} lines")
    print(f"\nimports: {sum(map(len, GRAPH.values()))}, {depth(GRAPH) if not circle(GRAPH) else '?'} modules deep")
    print(f"upward:  {[f'{a} -> {b}' for a, b in upward()] or 'none'}")
    print(f"circles: {circle(GRAPH) or 'none'}")
    longest = max(MODULES, key=lambda m: lines_of(MODULES[m]))
    print(f"longest: file {longest} ({lines_of(MODULES[longest])}), function {longest_function()}")
    if "--modules" in sys.argv:
        for module, imported in GRAPH.items():
            print(f"{module}: {' '.join(sorted(imported))}")


if __name__ == "__main__":
    main()
