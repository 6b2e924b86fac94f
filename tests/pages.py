"""Reads the project's Markdown pages: their fenced blocks, links, tables and what they name."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOP = ("csrc", "kernels", "pmc_fast", "benchmarks", "tests", "examples", "docs")
SOURCE = (".py", ".cpp", ".cu", ".h", ".cuh")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `line` is where its text begins."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return a page's fenced blocks in order, those of `languages` if any are given."""
    text = page.read_text(encoding="utf-8")
    found = [Block(page, text[: m.start(2)].count("\n") + 1, m[1], m[2]) for m in FENCE.finditer(text)]
    return [b for b in found if not languages or b.language in languages]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path, program: str) -> list[str]:
    """Return the command lines of a page's bash blocks that begin with `program`, continued lines joined."""
    lines = [line for b in blocks(page, "bash") for line in b.text.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip().startswith(program + " ")]


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and images that are not addresses elsewhere."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [t for t in targets if not re.match(r"\w+:", t)]


def anchors(page: Path) -> set[str]:
    """Return what GitHub calls a page's headings in links."""
    heads = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def named_paths(page: Path) -> set[str]:
    """Return what a page's code names as a file or folder of this repository.

    Words of inline code and of bash blocks that begin with a folder of the root, or end as source files do;
    my_script.py is the reader's.
    """
    code = [*re.findall(r"`([^`\n]+)`", prose(page)), *(b.text for b in blocks(page, "bash"))]
    words = {w.rstrip("/.:,") for text in code for w in re.findall(r"(?<![\w./-])[\w.*][\w./*-]*", text)}
    inside = {w for w in words if (w.split("/")[0] in TOP and "/" in w) or w.endswith(SOURCE)}
    return {w for w in inside if not w.startswith("my_")}


def tables(page: Path) -> list[tuple[list[str], list[list[str]]]]:
    """Return each table's header cells and rows of cells."""
    found = []
    for lines in re.findall(r"(?:^\|.*\|\n){2,}", prose(page), re.MULTILINE):
        header, _, *rows = [[c.strip() for c in line[1:-1].split("|")] for line in lines.splitlines()]
        found.append((header, rows))
    return found
