"""What `make docs` adds to MkDocs: pages of the repository's root, result files, tables of settings, formulas as MathML."""

import dataclasses
import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from pmc_fast import config as settings

ROOT = Path(__file__).parent.parent
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add README as the home page, the other pages of the root, and what `benchmarks/results/` holds."""
    for page in ROOT.glob("*.md"):
        files.append(File.generated(config, _uri(page.name), abs_src_path=str(page)))
    for result in (ROOT / "benchmarks/results").iterdir():
        files.append(File.generated(config, f"benchmarks/results/{result.name}", abs_src_path=str(result)))
    return files


def _uri(name: str) -> str:
    return "index.md" if name == "README.md" else name


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links between the root and docs/ links between pages of the site."""
    prefix = r"docs/|" if (ROOT / page.file.src_uri).exists() or page.file.src_uri == "index.md" else r"\.\./"
    markdown = re.sub(rf"\]\((?:{prefix})([\w./-]+)", lambda match: f"]({_uri(match[1])}", markdown)
    return re.sub(r"<!-- fields: (\w+) -->", lambda match: fields_table(match[1]), markdown)


def fields_table(name: str) -> str:
    """Return the settings of a configuration class with their defaults and help texts, as Markdown."""
    rows = ["| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(getattr(settings, name)):
        text = html.escape(field.metadata["help"]).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{field.default!r}` | {text} |")
    return "\n".join(rows)


def on_page_content(content: str, **_: Any) -> str:
    return INLINE.sub(lambda match: _mathml(html.unescape(match[1]), "inline"), content)


def math_block(source: str, *_: Any, **__: Any) -> str:
    """Return a fenced block of LaTeX as MathML."""
    return _mathml(source.strip(), "block")


def _mathml(latex: str, display: str) -> str:
    made = convert(latex, display=display)
    if left := re.findall(r"\\[a-zA-Z]+", made):  # commands that it does not know are passed on as text
        raise PluginError(f"the formula {latex} has {left[0]}, which becomes no MathML")
    return made
