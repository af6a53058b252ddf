"""Print errors of commands as an `error:` line and `hint:` lines on standard error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Final, TypeVar

import typer

from jobledger.cli.output.terminal_text import echo_text

_Error = TypeVar("_Error", bound=Exception)
_WRONG_CHOICE: Final = re.compile(r"'([^']*)' is not one of (.*)\.", re.DOTALL)
_SUGGESTION: Final = re.compile(r"[.,]? ?\(?(?:Did you mean|Possible options:) (.*?)[?)]", re.DOTALL)


def with_hint(error: _Error, *hints: str) -> _Error:
    """Add hints to an error and return it. Each is printed as a line after the error."""
    for hint in hints:
        error.add_note(hint)
    return error


def print_error(error: Exception) -> None:
    """Print an error and the hints that were added to it."""
    _print(str(error), getattr(error, "__notes__", ()))


def print_usage_error(error: typer.TyperException) -> None:
    """Print that the arguments of a command are wrong, the closest correct value, and how to get help."""
    message = error.format_message().replace("Value error, ", "")
    hints: list[str] = []
    if suggestion := _SUGGESTION.search(message):
        message = f"{message[: suggestion.start()]}."
        hints.append(f"Did you mean {suggestion[1]}?")
    elif (choice := _WRONG_CHOICE.search(message)) and (
        similar := find_similar(choice[1], re.findall(r"'([^']+)'", choice[2]))
    ):
        hints.append(f"Did you mean {similar!r}?")
    ctx: Any = getattr(error, "ctx", None)
    hints += _suggest_other_command(ctx, str(getattr(error, "option_name", ""))) if ctx is not None else ()
    hints.append(f"See `{ctx.command_path if ctx is not None else 'jobledger'} --help`.")
    _print(message, hints)


def _suggest_other_command(ctx: Any, option: str) -> Iterator[str]:
    """Yield what users of kubectl and gh may have meant."""
    root = ctx.find_root()
    if ctx is not root and any(option in param.opts for param in root.command.params):
        yield f"{option} belongs before the command: `{root.info_name} {option} …`."
    if ctx.parent is not None and ctx.command.name == "get" and "ls" in ctx.parent.command.commands:
        yield f"List with `{ctx.parent.command_path} ls`."


def find_similar(text: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is most similar to a text, or None."""
    names = {choice.lower(): choice for choice in choices}
    return next((names[name] for name in difflib.get_close_matches(text.lower(), names, n=1)), None)


def _print(message: str, hints: Iterable[str]) -> None:
    with suppress(OSError):  # the exit code still says that the command failed
        echo_text(f"error: {message}", err=True)
        for hint in hints:
            echo_text(f"hint: {hint}", err=True)
