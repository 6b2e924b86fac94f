"""The command that measures a model: pmc-fast bench."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..config import QUICK, BenchConfig
from ..errors import PMCError
from ..utils.files import write_file
from ..utils.text import printable
from .common import json_option
from .display import Progress, console
from .options import config_options, given

QUICK_HELP = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())


@click.command()
@click.option(
    "--quick",
    is_flag=True,
    help=f"a small benchmark, one to two minutes for 135M parameters on two CPU cores: {QUICK_HELP}",
)
@json_option
@click.option(
    "--compare", multiple=True, metavar="FILE",
    help="show an earlier --json file beside this run's result, or without MODEL beside others; may be repeated",
)  # fmt: skip
@config_options(BenchConfig)
def bench(quick: bool, json_file: str | None, compare: tuple[str, ...], **options: Any) -> None:
    """Measure rollouts, a training step and weighted_nll of MODEL, each against its baseline in the same run.

    The baselines are Hugging Face generate, the published step (padded) and plain torch. Results of different machines
    or settings are not shown together.
    """
    settings = given(options)
    if not settings and compare and not quick and not json_file:
        _compare(dict.fromkeys(compare))
        return
    config = BenchConfig.merge(quick, settings)
    from ..bench import results, run

    earlier = {file: _earlier(file) for file in compare}
    plan = run.check(config)
    results.require_alike(earlier | {"this run": plan.conditions()}, *run.CONDITIONS)
    with Progress() as progress:
        made = run.measure(plan, progress)
    print_results(made)
    if json_file:
        write_file(json_file, results.dumps(made) + "\n")
    if earlier:
        _print_beside(earlier | {"this run": made})


def _compare(files: dict[str, Any]) -> None:
    from ..bench import results, run

    earlier = {file: _earlier(file) for file in files}
    results.require_alike(earlier, *run.CONDITIONS)
    if len(earlier) == 1:
        print_results(*earlier.values())
    else:
        _print_beside(earlier)


def _earlier(file: str) -> dict[str, Any]:
    from ..bench import results

    found = results.read(file)
    if found.get("suite") != "bench":
        raise PMCError(f"{file} is of the suite {found.get('suite')!r}: give a file that pmc-fast bench --json wrote")
    return found


def print_results(made: dict[str, Any]) -> None:
    """Print what was measured, what was compared before, and on what."""
    click.echo(_setting(made))
    console().print(table_of(made))
    click.echo("compared before: " + "; ".join(result["facts"]["equal"] for result in made["results"]))
    click.echo(measured_on(made))


def table_of(made: dict[str, Any], names: Sequence[str] = ()) -> Any:
    """Return a result as a table, with all its quantities or those of `names`."""
    from rich.markup import escape

    from ..bench import table

    shown = _table(table.OURS, "baseline", "x")
    for result in made["results"]:
        for line in table.lines(result):
            if names and not line.title and line.name not in names:
                continue
            theirs = next((v for who, v in line.values.items() if who != table.OURS), "")
            indent = "" if line.title else "  "
            shown.add_row(escape(indent + line.name), line.values.get(table.OURS, ""), theirs, line.ratio)
    return shown


def _table(*columns: str) -> Any:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for column in columns:
        made.add_column(column, justify="right")
    return made


def _print_beside(documents: dict[str, dict[str, Any]]) -> None:
    """Print results beside each other."""
    from rich.markup import escape

    from ..bench import table

    click.echo(_setting(next(iter(documents.values()))))
    shown = _table(*(escape(printable(Path(name).name)) for name in documents))
    for name, cells in table.beside(list(documents.values())):
        shown.add_row(escape(name), *cells)
    console().print(shown)
    for name, made in documents.items():
        model = made["facts"]["model"]["name"]
        click.echo(f"{printable(Path(name).name)}: {printable(model)}; {measured_on(made)}")


def _setting(made: dict[str, Any]) -> str:
    from ..bench.table import few_rounds

    s, m = made["facts"]["settings"], made["facts"]["model"]
    where = f"{m['compute_dtype']} on {s['device']}"
    few = " (few: ranges tell more than medians)" if few_rounds(s["rounds"]) else ""
    rounds = f"{s['rounds']} round{'s' * (s['rounds'] > 1)}{few}"
    q = made["facts"]["questions"]
    return printable(
        f"{m['name']}: {m['class']}, {m['parameters'] / 1e6:,.1f}M parameters, {where}\n"
        f"{s['batch_size']} questions ({q['forget']}) x {s['num_samples']} samples, temperature {s['temperature']:g}, "
        f"top_k {s['top_k']}, top_p {s['top_p']:g}; {s['batch_size']} retain pairs ({q['retain']})\n"
        f"prompt and answer at most {s['max_length']} tokens; medians (smallest - largest) of {rounds}"
    )


def measured_on(made: dict[str, Any]) -> str:
    """Return the device, versions, commit and date of a result."""
    m, v = made["machine"], made["versions"]
    threads = f"{m['threads']} thread{'s' * (m['threads'] != 1)}"
    on_gpu = made["facts"]["settings"]["device"] == "cuda"
    device = m["gpu"] if on_gpu else f"{m['cpu']}, {threads}"
    commit = made["commit"] or "unknown"
    short = commit[:12] + "-dirty" * commit.endswith("-dirty")
    return (
        f"{device}; torch {v['torch']}, transformers {v['transformers']}, pmc_fast {v['pmc_fast']}, "
        f"commit {short}, {made['date']}"
    )
