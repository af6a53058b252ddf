"""tests: rules as sentences: `given(events).when(command).then(events)`. Pure, as the rules are."""

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
    """A command that meets a history."""

    decider: Decider
    state: Any
    command: Any

    def then(self, *events: Event) -> None:
        """It causes exactly these events, which the rules can then fold."""
        decided = list(self.decider.decide(self.command, self.state))
        assert decided == list(events)
        state = self.state
        for event in decided:
            state = self.decider.evolve(state, event)

    def then_no_events(self) -> None:
        """It is accepted, and there is nothing to do."""
        assert list(self.decider.decide(self.command, self.state)) == []

    def then_rejected(self, error: type[CommandRejected], match: str | None = None) -> None:
        """The rules say no."""
        with pytest.raises(error, match=match):
            self.decider.decide(self.command, self.state)


@dataclass(frozen=True)
class Given:
    """A history, and what it amounts to."""

    rules: Decider
    state: Any

    def when(self, command: Any) -> When:
        return When(self.rules, self.state, command)


def given_for(decider: Decider) -> Callable[..., Given]:
    """Return the function `given(*events)` for one kind of stream."""

    def given(*events: Event) -> Given:
        state = None
        for event in events:
            state = decider.evolve(state, event)
        return Given(decider, state)

    return given
