"""The commands for a stack of erasure requests: pmc-fast merge, rollback and verify."""

from typing import Any

import click

from ..config import VerifyConfig
from .common import FILE, json_option, write_json
from .display import Progress, print_gates, print_verification, print_warnings
from .options import config_options, given


@click.command()
@click.option("--stack", type=FILE, required=True, help="directory of the model's adapters")
@click.option("--output", type=FILE, required=True, help="output directory, new or empty")
@click.option("--model", type=FILE, default="", help="location of the base model (unset: as in the last record)")
@click.option("--adapter", is_flag=True, help="write one PEFT adapter with the concatenated ranks instead of a model")
@click.option(
    "--save-dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
    help="dtype of the model (auto: that of the base model)",
)  # fmt: skip
@json_option
def merge(stack: str, output: str, model: str, adapter: bool, save_dtype: str, json_file: str | None) -> int:
    """Export all requests of STACK as one model or one adapter. The base model is not changed."""
    from ..erasure import export

    made = export.merge(stack, output, model=model, adapter=adapter, save_dtype=save_dtype)
    what = f"one adapter of rank {made['rank']}" if adapter else f"one {made['dtype']} model"
    click.echo(f"{len(made['requests'])} requests as {what} in {output}")
    click.echo(f"effective weights {made['weights']}, as recorded")
    if adapter and made["vllm_max_lora_rank"]:
        click.echo(f"vLLM needs --max-lora-rank {made['vllm_max_lora_rank']}")
    elif adapter:
        print_warnings([f"rank {made['rank']} is above vLLM's largest: serve what merge writes without --adapter"])
    elif made["saved"] != made["weights"]:
        click.echo(
            f"saved weights     {made['saved']}: rounded to {made['dtype']}; --save-dtype float32 rounds nothing"
        )
    write_json(json_file, made | {"output": output})
    return 0


@click.command()
@click.option("--stack", type=FILE, required=True, help="directory of the model's adapters")
@click.option(
    "--request",
    default="",
    help="name of the request, such as 0002, as a safeguard: only the last one can be rolled back",
)
@click.option("--model", type=FILE, default="", help="location of the base model (unset: as in the last record)")
@json_option
def rollback(stack: str, request: str, model: str, json_file: str | None) -> int:
    """Remove the last request from STACK and check that the effective weights are those before it."""
    from ..erasure import export

    made = export.roll_back(stack, request, model=model)
    click.echo(f"request {made['request']} is rolled back, and kept in {made['kept']}")
    click.echo(f"effective weights {made['weights']}, as recorded before it")
    write_json(json_file, made)
    return 0


@click.command()
@json_option
@config_options(VerifyConfig)
@click.argument("files", nargs=-1, metavar="[FILE]...", type=FILE)
def verify(json_file: str | None, files: tuple[str, ...], **options: Any) -> int:
    """Ask the questions of STACK's requests again: --requests FILE..., and check utility.

    Each file is checked against the records' hashes. Output-level evidence: what the model answers, not that its
    weights are clean.
    """
    options["requests"] = (*options["requests"], *files)
    config = VerifyConfig(**given(options))
    from ..erasure.verify import verify as run

    with Progress() as progress:
        made = run(config, progress)
    print_verification(made)
    write_json(json_file, made)
    return print_gates(made)
