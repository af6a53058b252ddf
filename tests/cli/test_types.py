"""`jobledger types` reads job types from the OpenAPI document, and rejects documents of other servers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, RootModel

from jobledger.api.app import ROUTES
from jobledger.api.openapi.document import build_document
from tests.support.in_process_command import run_command_in_process
from tests.support.scripted_server import serve_answers


class Cat(BaseModel):
    name: str
    lives: int = 9


class Dog(BaseModel):
    name: str
    barks: bool


@pytest.mark.parametrize(
    "body",
    ["<html>", "[]", "{}", '{"components": {"schemas": {"JobBody": {"$ref": "#/components/schemas/Missing"}}}}'],
)
def test_types_ls_document_of_other_server_is_an_error(
    body: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_answers((200, body)) as url:
        outcome = run_command_in_process("types", "ls", "--url", url, capfd=capfd, monkeypatch=monkeypatch)
    assert outcome.exit_code == 1
    assert "it is not a Jobledger API" in outcome.err


def test_types_get_parameters_with_several_forms_lists_all_and_requires_what_all_require(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = build_document(ROUTES, {"pet": RootModel[Cat | Dog]})
    with serve_answers((200, json.dumps(document))) as url:
        arguments = ("types", "get", "pet", "-o", "json", "--url", url)
        outcome = run_command_in_process(*arguments, capfd=capfd, monkeypatch=monkeypatch)
    parameters: list[dict[str, Any]] = json.loads(outcome.out)["parameters"]
    assert [(it["name"], it["required"], it["default"]) for it in parameters] == [
        ("name", True, None),
        ("lives", False, 9),
        ("barks", False, None),
    ]
