"""`jobledger completion`: scripts with which shells complete commands and options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from jobledger.cli.output.terminal_text import echo_page

COMPLETION_VARIABLE = "_JOBLEDGER_COMPLETE"
"""The environment variable by which these scripts ask the command for completions."""


def complete(command: Any) -> None:
    """Print the completions that a shell asks for by environment variables, and end the process."""
    from typer import completion

    completion.completion_init()  # type: ignore[attr-defined]  # not in the typed interface of Typer
    command.main(prog_name="jobledger", complete_var=COMPLETION_VARIABLE)


def print_completion_script(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish")],
) -> None:
    """Print a script that completes commands and options in your shell

    Load it in the current shell, or write it to the directory from which your shell loads completions.

    Examples:
        source <(jobledger completion bash)
        jobledger completion zsh > ~/.zfunc/_jobledger
        jobledger completion fish > ~/.config/fish/completions/jobledger.fish
    """
    from typer import completion

    script = completion.get_completion_script(  # type: ignore[attr-defined]  # not in the typed interface of Typer
        prog_name="jobledger", complete_var=COMPLETION_VARIABLE, shell=shell
    )
    echo_page(script)
