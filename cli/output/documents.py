"""Print documents of the API: as a table, as JSON or YAML, or only their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import typer
from rich.text import Text

from jobledger.cli.output.errors import with_hint
from jobledger.cli.output.terminal_text import echo, print_json, print_table, print_yaml
from jobledger.ledger.domain.errors import ConfigurationError

Document = dict[str, Any]
Rows = Iterable[Sequence[str | Text]]
"""The header and the rows of a table."""
OutputFormat = Literal["json", "yaml", "wide", "name"]
ALL_FIELDS: Final = "*"
"""The value of `--json` without fields."""
_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class Output:
    """How a command prints documents. None: as a table. `fields`: only these, of JSON; None: all."""

    format: OutputFormat | None = None
    fields: tuple[str, ...] | None = None

    @property
    def is_wide(self) -> bool:
        return self.format == "wide"

    @property
    def is_data(self) -> bool:
        return self.format in ("json", "yaml")

    def print_document(self, document: Any) -> None:
        """Print a document, or a list of documents, as JSON or YAML."""
        if self.format == "yaml":
            print_yaml(document)
        elif self.fields is None:
            print_json(document)
        elif isinstance(document, list):
            print_json([_select_fields(item, self.fields) for item in document])
        else:
            print_json(_select_fields(document, self.fields))

    def print_list(
        self,
        documents: Sequence[Document],
        build_rows: Callable[[Sequence[Document]], Rows],
        *,
        id_field: str,
        empty_text: str,
    ) -> None:
        """Print a list.

        Args:
            documents: The documents.
            build_rows: Returns header and rows of the table.
            id_field: The field that `-o name` prints.
            empty_text: Printed instead of a table without rows.
        """
        if self.is_data:
            self.print_document(list(documents))
        elif self.format == "name":
            for document in documents:
                echo(document[id_field])
        elif documents:
            print_table(build_rows(documents), fits_terminal=not self.is_wide)
        else:
            echo(empty_text, err=True)


def build_output(
    output: Annotated[
        OutputFormat | None,
        typer.Option("--output", "-o", help="json, yaml, wide (more columns) or name (IDs only)"),
    ] = None,
    json_fields: Annotated[
        str | None,
        typer.Option("--json", metavar="[FIELDS]", help="Print JSON, with these fields only, e.g. status,error.code"),
    ] = None,
) -> Output:
    """Return how to print documents.

    Raises:
        ConfigurationError: The options contradict each other.
    """
    if json_fields is None:
        return Output(output)
    if output not in (None, "json"):
        raise ConfigurationError(f"--json and --output {output} cannot be combined: use one of them.")
    return Output("json", None if json_fields == ALL_FIELDS else tuple(json_fields.split(",")))


def _select_fields(document: Mapping[str, Any], fields: Sequence[str]) -> Document:
    return {field: _get_field(document, field) for field in fields}


def _get_field(document: Mapping[str, Any], path: str) -> Any:
    """Return a field, or a field of an object in it. An object that is null has only null fields."""
    value: Any = document
    for name in path.split("."):
        if value is None:
            return None
        known = value if isinstance(value, Mapping) else {}
        value = known.get(name, _MISSING)
        if value is _MISSING:
            error = ConfigurationError(f"--json {path}: unknown field.")
            raise with_hint(error, f"Fields: {', '.join(sorted(known))}.") if known else error
    return value
