"""The command that compares methods: pmc-fast compare."""

from typing import Any

import click

from ..config import SHARED, CompareConfig, UnlearnConfig
from .common import json_option, write_json
from .display import Progress, console
from .options import config_options, given, preset_option


@click.command()
@preset_option
@click.option("--dry-run", is_flag=True, help="check everything, print the runs, write nothing")
@json_option
@config_options(CompareConfig)
@config_options(UnlearnConfig, SHARED)
def compare(preset: str | None, dry_run: bool, json_file: str | None, **options: Any) -> int:
    """Compare methods on MODEL, FORGET and RETAIN: a run for each method and seed, with equal time or steps.

    OUTPUT gets compare.html, compare.json and a directory for each run. A finished run is not repeated.
    """
    settings = given(options)
    shared = {name: settings.pop(name) for name in SHARED if name in settings}
    config = CompareConfig(**settings)
    runs = config.runs(preset, shared)
    from ..jobs import compare as job

    if dry_run:
        checked = job.check(config, runs)
        for run in checked:
            click.echo(f"{run.name}: {'finished' if run.found else 'to be made'}")
        write_json(json_file, {"runs": [{"name": run.name, "finished": run.found is not None} for run in checked]})
        return 0
    with Progress() as progress:
        made = job.compare(config, runs, progress)
    print_comparison(made)
    write_json(json_file, made)
    click.echo(f"\ncompare.html and compare.json are in {config.output}")
    return 0


def print_comparison(made: dict[str, Any]) -> None:
    """Print the table of a comparison."""
    from rich.table import Table

    from ..report import comparison

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    rows = comparison.rows(made)
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row.values())
    console().print(table)
    for run in made["runs"]:
        if run["diverged"]:
            click.echo(f"{run['method']['name']}, seed {run['seed']}: {run['diverged']}")
