"""`pmc-fast completion`: what a shell needs to complete commands, options, their values and names of files."""

import click
from click.shell_completion import get_completion_class

PROGRAM, VARIABLE = "pmc-fast", "_PMC_FAST_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print the completion script of SHELL: source it, or keep it where the shell looks for such scripts.

    \b
    bash:  source <(pmc-fast completion bash)      in ~/.bashrc
    zsh:   source <(pmc-fast completion zsh)       in ~/.zshrc, after compinit
    fish:  pmc-fast completion fish | source       in ~/.config/fish/config.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # click has one for each choice
    click.echo(made(context.find_root().command, {}, PROGRAM, VARIABLE).source())
    return 0
