"""Specifications of deciders: `given(events).when(command).then(events)`. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from jobledger.ledger.domain.errors import CommandRejected
from jobledger.ledger.domain.events import Event
from jobledger.ledger.store.command_handler import Decider


@dataclass(frozen=True)
class When:
    """A command for a stream with a history."""

    decider: Decider
    state: Any
    command: Any

    def then(self, *events: Event) -> None:
        """Assert that the command causes exactly these events, and that the decider can evolve them."""
        decided = list(self.decider.decide(self.command, self.state))
        assert decided == list(events)
        state = self.state
        for event in decided:
            state = self.decider.evolve(state, event)

    def then_no_events(self) -> None:
        """Assert that the command is accepted without events."""
        assert list(self.decider.decide(self.command, self.state)) == []

    def then_rejected(self, error: type[CommandRejected], match: str | None = None) -> None:
        """Assert that the decider rejects the command."""
        with pytest.raises(error, match=match):
            self.decider.decide(self.command, self.state)


@dataclass(frozen=True)
class Given:
    """A history and the resulting state."""

    rules: Decider
    state: Any

    def when(self, command: Any) -> When:
        return When(self.rules, self.state, command)


def given_for(decider: Decider) -> Callable[..., Given]:
    """Return the function `given(*events)` for a decider."""

    def given(*events: Event) -> Given:
        state = None
        for event in events:
            state = decider.evolve(state, event)
        return Given(decider, state)

    return given


def parametrize_histories(histories: dict[str, list[Event]]) -> pytest.MarkDecorator:
    """Return a decorator that runs a test with each history, by name."""
    return pytest.mark.parametrize("history", histories.values(), ids=histories.keys())


def type_name(value: Any) -> str:
    """Return the name of a type, or of a value's type. For parametrize IDs."""
    return value.__name__ if isinstance(value, type) else type(value).__name__
