"""tests: rules as sentences: `given(events).when(command).then(events)`. Pure, as the rules are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from jobledger.ledger.domain.errors import CommandRefused
from jobledger.ledger.domain.events import Event
from jobledger.ledger.store.command_handler import Rules


@dataclass(frozen=True)
class When:
    """A command that meets a history."""

    rules: Rules
    state: Any
    command: Any

    def then(self, *events: Event) -> None:
        """It causes exactly these events, which the rules can then fold."""
        decided = list(self.rules.decide(self.command, self.state))
        assert decided == list(events)
        state = self.state
        for event in decided:
            state = self.rules.evolve(state, event)

    def then_nothing(self) -> None:
        """It is accepted, and there is nothing to do."""
        assert list(self.rules.decide(self.command, self.state)) == []

    def refused(self, error: type[CommandRefused], match: str | None = None) -> None:
        """The rules say no."""
        with pytest.raises(error, match=match):
            self.rules.decide(self.command, self.state)


@dataclass(frozen=True)
class Given:
    """A history, and what it amounts to."""

    rules: Rules
    state: Any

    def when(self, command: Any) -> When:
        return When(self.rules, self.state, command)


def given_with(rules: Rules) -> Callable[..., Given]:
    """Return the function `given(*events)` for one kind of stream."""

    def given(*events: Event) -> Given:
        state = None
        for event in events:
            state = rules.evolve(state, event)
        return Given(rules, state)

    return given
