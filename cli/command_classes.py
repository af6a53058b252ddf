"""Classes of all commands: help pages with examples, names that other tools use, and checks of arguments.

The docstring of a command is its help page. After `Examples:`, it has one command line per line, and comments. A test
runs them. `docs/reference/commands.md` contains all help pages.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from jobledger.cli.output.documents import ALL_FIELDS
from jobledger.cli.output.terminal_text import echo_page

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ALIASES: Final = {"list": "ls", "show": "get", "view": "get", "describe": "get", "restart": "retry", "log": "logs"}
"""Names that users of other tools, or of the API, try. They work, but no help page shows them."""
_FIELD_LIST: Final = re.compile(r"[a-z_]+(\.[a-z_]+)*(,[a-z_]+(\.[a-z_]+)*)*")
_LAST_SECTIONS: Final = ("Audit", "Other", "Filters", "Options")
"""Sections at the end of a help page. Those before them are in the order of their first entry."""
MAX_HELP_WIDTH: Final = 120


class _HelpPage:
    """What commands and groups have in common. `examples` are the lines after `Examples:` in the docstring."""

    params: list[Any]
    help: str | None
    examples: str

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        text, _, examples = (self.help or "").partition("Examples:\n")
        self.help, self.examples = text.strip(), inspect.cleandoc(examples)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page: description, usage, examples, commands, arguments and options."""
        formatter.write_text(self.help)
        formatter.write_paragraph()
        pieces = self.collect_usage_pieces(ctx)  # type: ignore[attr-defined]  # of the other base class
        formatter.write_usage(ctx.command_path, " ".join(pieces).replace("{", "").replace("}", ""))
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n" if line else "\n")
        for heading, rows in self._list_sections(ctx).items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def _list_sections(self, ctx: Any) -> Mapping[str, list[tuple[str, str]]]:
        """Return the rows of the help page by heading: subcommands, then arguments, then options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in getattr(self, "commands", {}).items():
            if not command.hidden:
                heading = command.rich_help_panel or "Commands"
                sections.setdefault(heading, []).append((name, command.get_short_help_str(limit=1000)))
        params = self.get_params(ctx)  # type: ignore[attr-defined]  # of the other base class
        for param in sorted(params, key=lambda param: bool(param.param_type_name == "option")):
            if (row := param.get_help_record(ctx)) is not None:
                default = "Options" if param.param_type_name == "option" else "Arguments"
                heading = getattr(param, "rich_help_panel", None) or default
                label = row[0] if param.param_type_name == "option" else row[0].partition(" <")[0]
                sections.setdefault(heading, []).append((label, row[1].replace("exit.", "exit")))
        return dict(
            sorted(
                sections.items(),
                key=lambda section: section[0] in _LAST_SECTIONS and 1 + _LAST_SECTIONS.index(section[0]),
            )
        )

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            typer.BadParameter: A value is not text.
        """
        if any("--json" in param.opts and not param.is_flag for param in self.params):
            args = list(_join_json_fields(args))
        rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]  # of the other base class
        for param in self.params:
            value = ctx.params.get(param.name)
            if param.type.name in ("file", "path"):  # a file name need not be text
                continue
            try:
                if isinstance(value, str):
                    ctx.params[param.name] = _decode(value)
                elif isinstance(value, list | tuple):
                    ctx.params[param.name] = [_decode(item) if isinstance(item, str) else item for item in value]
            except UnicodeDecodeError:
                raise typer.BadParameter("expected text in UTF-8", ctx=ctx, param=param) from None
        return rest


def _join_json_fields(args: Sequence[str]) -> Iterator[str]:
    """Yield arguments, with `--json` and the field list after it, if there is one, as one argument."""
    iterator = iter(enumerate(args))
    for number, argument in iterator:
        following = args[number + 1] if number + 1 < len(args) else ""
        if argument != "--json":
            yield argument
        elif _FIELD_LIST.fullmatch(following):
            next(iterator)
            yield f"--json={following}"
        else:
            yield f"--json={ALL_FIELDS}"


def _decode(text: str) -> str:
    """Return an argument as text in UTF-8, whatever the encoding of the locale is."""
    return text if text.isascii() else os.fsencode(text).decode()


class HelpCommand(_HelpPage, TyperCommand):
    """A command with a help page."""


class HelpGroup(_HelpPage, TyperGroup):
    """A group of commands. Without a command, it prints its help page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, or print the help page if there are none."""
        if not args and not ctx.resilient_parsing:
            echo_page(ctx.get_help())
            raise typer.Exit
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command with this name or alias."""
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, _ALIASES.get(cmd_name, ""))


class CommandApp(typer.Typer):
    """A group of commands to which functions are added with `command()`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            cls=HelpGroup,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            add_completion=False,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_HELP_WIDTH},
            **options,
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[[_Function], _Function]:
        """Return a decorator that adds a function as a command."""
        return super().command(name, cls=HelpCommand, **options)


def use_options(**builders: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces parameters of a command by the options of functions.

    Args:
        builders: For each replaced parameter, a function whose parameters are options. The command gets its result.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters
        added = {name: inspect.signature(builder, eval_str=True).parameters for name, builder in builders.items()}

        def run(**values: Any) -> None:
            built = {
                name: builders[name](**{option: values.pop(option) for option in options})
                for name, options in added.items()
            }
            function(**values, **built)

        merged: list[inspect.Parameter] = []
        for name, parameter in own.items():
            merged += added[name].values() if name in added else [parameter]
        ordered = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in merged]
        run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]  # read by Typer
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        return run

    return decorate
