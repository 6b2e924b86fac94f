"""The documents fit the code: what they show runs, what they name exists, numbers are those of the result files."""

import ast
import fnmatch
import importlib
import importlib.util
import inspect
import json
import re
import shlex

import pytest

from benchmarks import kernels_page, suites
from pmc_fast.cli.main import main
from tests.pages import PAGES, ROOT, anchors, blocks, commands, links, named_paths, tables

DOCS = ROOT / "docs"
TUTORIAL, KERNELS = DOCS / "tutorial.md", DOCS / "kernels.md"
PYTHON = [b for page in PAGES for b in blocks(page, "python")]
PAGES_NOW = [p for p in PAGES if p.name != "CHANGELOG.md"]  # which speaks of what was
TINY = {  # rates that a model of two random layers learns at; its samples are long
    "lr=1e-4": "lr=1e-2",
    "lr=5e-5": "lr=3e-3",
    "learning_rate=5e-5": "learning_rate=3e-3",
    "--learning-rate 5e-5": "--learning-rate 3e-3",
    "--attack-samples 20": "--attack-samples 3",
}


def by_page(page):
    return page.name


def files():
    return [str(p.relative_to(ROOT)) for top in ROOT.iterdir() if _ours(top) for p in _below(top)]


def _ours(top):
    return top.name == ".ci" or not top.name.startswith((".", "build", "dist", "demo_output"))


def _below(top):
    return [top, *(top.rglob("*") if top.is_dir() else [])]


# --- python blocks


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_names_and_keywords_in_python_blocks_exist(block):
    tree = ast.parse(block.text, str(block))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    assert importlib.util.find_spec(f"{node.module}.{alias.name}"), f"{block}: no {alias.name}"
                    continue
                found[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(found.get(node.func.id)):
            parameters = inspect.signature(found[node.func.id]).parameters.values()
            if any(p.kind == p.VAR_KEYWORD for p in parameters):
                continue
            given = {k.arg for k in node.keywords if k.arg}
            unknown = given - {p.name for p in parameters}
            assert not unknown, f"{block}: {node.func.id} does not know {sorted(unknown)}"


# --- command lines


def run(line):
    with pytest.raises(SystemExit) as done:
        main(shlex.split(line, comments=True)[1:])
    return done.value.code


@pytest.mark.parametrize("page", PAGES_NOW, ids=by_page)
def test_options_of_commands_exist(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for line in commands(page, "pmc-fast"):
        words = shlex.split(line, comments=True)[1:]
        flags = {w for w in words if w.startswith("--")}
        command = [w for w in words[:2] if re.fullmatch(r"[a-z-]+", w) and not w.startswith("-")]
        assert not run(shlex.join(["pmc-fast", *command[:1], "--help"])), line
        helped = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert flags <= helped | {"--help", "--version"}, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES_NOW, ids=by_page)
def test_modules_that_are_run_exist(page):
    lines = [line for b in blocks(page, "bash") for line in b.text.splitlines()]
    code = [*lines, *re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))]
    for module in {m for text in code for m in re.findall(r"\bpython3? -m ([\w.]+)", text)}:
        assert importlib.util.find_spec(module), f"{page.name}: python -m {module}"


# --- links and paths


@pytest.mark.parametrize("page", PAGES, ids=by_page)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES_NOW, ids=by_page)
def test_paths_that_are_named_exist(page):
    there = files()
    missing = [
        path
        for path in sorted(named_paths(page))
        if not any(fnmatch.fnmatch(file, path) or fnmatch.fnmatch(file, f"*/{path}") for file in there)
    ]
    assert not missing, f"{page.name}: {missing}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


# --- the tutorial


def test_the_tutorial_runs(tiny_dir, tmp_path, monkeypatch, capsys):
    """Block by block as it stands, in an empty folder, on the tiny model at rates that it learns at."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_dir)
    names = {"__name__": "tutorial"}
    for block in blocks(TUTORIAL, "python", "bash"):
        text = block.text
        for real, small in TINY.items():
            text = text.replace(real, small)
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + text, str(TUTORIAL), "exec"), names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("pmc-fast "):
                assert run(line) == 0, line
    printed = capsys.readouterr().out
    assert "unlearn quality" in printed
    checked_results(tmp_path, names)


def checked_results(folder, names):
    """What the tutorial promises has come about: the facts were learned, and three times forgotten."""
    report = json.loads((folder / "by_command/report.json").read_text())
    assert report["before"]["unlearn_quality"] < 10
    assert report["after"]["unlearn_quality"] > report["before"]["unlearn_quality"] + 20
    for name in ("by_trainer", "by_loop"):
        assert names["scores"][name]["unlearn_quality"] > names["scores"]["taught"]["unlearn_quality"] + 20, name


# --- numbers


def test_numbers_of_the_kernels_page_are_those_of_the_result_files():
    """In tables whose first head links to a result file, to the digits that are shown."""
    text, results = KERNELS.read_text(encoding="utf-8"), suites.load()
    assert kernels_page.fill(text, results) == text, "run `python -m benchmarks.report --pages`"
    linked = sum("results/" in header[0] for header, _ in tables(KERNELS))
    assert len(kernels_page.TABLE.findall(text)) == linked > 3
    for of in results.documents.values():
        for result in of["results"]:
            for c in result.get("contestants", {}).values():
                c["median_s"] += 1000
    assert "pmc_fast | 1,000.5" in kernels_page.fill(text, results)  # a changed result changes the page
