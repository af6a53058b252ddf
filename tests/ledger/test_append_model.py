"""The exhaustive model of the append protocol: its guarantees hold, and each rule of the protocol is necessary."""

from __future__ import annotations

import pytest

from tests.ledger.append_model import AppendModel, Defect, Faults, Violation
from tests.support.soak_only import soak_only

Programs = tuple[tuple[str, ...], ...]

ONE_STREAM: Programs = (("s",), ("s",))
REPEATED: Programs = (("s+",), ("s+",))
ONE_COMMAND: Programs = (("s",),)
TWO_STREAMS: Programs = (("s",), ("t",))
GROUP: Programs = (("s t",), ("s",))
TRANSACTIONS: Programs = (("st",), ("ts",))
NEXT: Programs = (("s>",), ("s",))
NEXT_IN_GROUP: Programs = (("s> t",), ("s",))
TWO_WRITES: Programs = (("s", "s"), ("s",))


def find_violation(programs: Programs, faults: Faults, defect: Defect) -> tuple[str, list[str]]:
    """Return the violation that a defect leads to, and the shortest sequence of steps to it."""
    model = AppendModel(programs, faults, defect)
    with pytest.raises(Violation) as found:
        model.check()
    return str(found.value), model.trace


@pytest.mark.parametrize(
    ("programs", "faults", "max_position"),
    [
        (ONE_STREAM, Faults(failovers=1), 4),
        (REPEATED, Faults(crashes=1, lost_responses=1), 4),
        (GROUP, Faults(failovers=1), 5),
        (TRANSACTIONS, Faults(lost_responses=1, late_requests=1), 6),
        (TWO_WRITES, Faults(late_requests=1), 5),
        (NEXT, Faults(failovers=1), 4),
        (NEXT, Faults(crashes=1, lost_responses=1), 5),
        (NEXT_IN_GROUP, Faults(late_requests=1), 5),
    ],
)
def test_append_protocol_keeps_guarantees_in_every_order_of_steps(
    programs: Programs, faults: Faults, max_position: int
) -> None:
    assert AppendModel(programs, faults, max_position=max_position).check() > 1000


@soak_only
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("programs", "faults", "max_position"),
    [
        (ONE_STREAM, Faults(crashes=1, lost_responses=1, late_requests=1), 5),
        (ONE_STREAM, Faults(failovers=1, lost_responses=1), 4),
        (ONE_STREAM, Faults(failovers=1, late_requests=1), 4),
        (ONE_STREAM, Faults(failovers=2), 4),
        (REPEATED, Faults(failovers=1, crashes=1), 5),
        (REPEATED, Faults(failovers=1, lost_responses=1), 4),
        (REPEATED, Faults(lost_responses=2, late_requests=1), 5),
        (GROUP, Faults(failovers=1, crashes=1), 5),
        (GROUP, Faults(lost_responses=2, late_requests=1), 5),
        ((("s+ s+",), ("s+",)), Faults(failovers=1), 5),
        (TRANSACTIONS, Faults(failovers=1, lost_responses=1), 6),
        (TRANSACTIONS, Faults(failovers=1, late_requests=1), 6),
        (TWO_WRITES, Faults(failovers=1), 5),
        ((("s",), ("s",), ("t",)), Faults(crashes=1), 5),
        (NEXT, Faults(failovers=1, lost_responses=1), 5),
        (NEXT, Faults(lost_responses=2, late_requests=1), 6),
        (NEXT_IN_GROUP, Faults(failovers=1), 7),
        ((("s>",), ("s>",)), Faults(failovers=1), 5),
    ],
)
def test_append_protocol_keeps_guarantees_with_more_faults(
    programs: Programs, faults: Faults, max_position: int
) -> None:
    assert AppendModel(programs, faults, max_position=max_position).check() > 10_000


@pytest.mark.parametrize(
    ("defect", "programs", "faults", "message"),
    [
        (Defect.POSITION_BELOW_BASIS, TWO_WRITES, Faults(failovers=1), "not the version that follows"),
        (Defect.NO_UNIQUE_VERSION, ONE_STREAM, Faults(), "not the version that follows"),
        (Defect.DECIDE_ON_LOCAL_READ, ONE_STREAM, Faults(failovers=1), "not the version that follows"),
        (Defect.ACKNOWLEDGE_EARLY, ONE_COMMAND, Faults(failovers=1), "succeeded, and has no event"),
        (Defect.RESOLVE_ON_LOCAL_READ, ONE_COMMAND, Faults(1, lost_responses=1), "succeeded, and has no event"),
        (Defect.DUPLICATE_IS_CONFLICT, TWO_STREAMS, Faults(), "was rejected, and no event has its version"),
        (Defect.IGNORE_EVENT_ID, ONE_COMMAND, Faults(lost_responses=1), "was rejected, and has an event"),
        (Defect.GROUP_FAILS_TOGETHER, GROUP, Faults(), "was rejected, and has an event"),
        (Defect.TRANSACTION_NOT_ATOMIC, (("st",), ("t",)), Faults(), "has the events"),
        (Defect.RETRY_WITHOUT_LOOK, ONE_COMMAND, Faults(lost_responses=1), "no step leads to the end"),
        (Defect.NEXT_WITHOUT_FIRST, (("s>",), ("t",)), Faults(), "not the version that follows"),
        (Defect.SKIP_GAPS, ONE_STREAM, Faults(), "which is not the log"),
        (Defect.READ_LOCALLY, ONE_COMMAND, Faults(failovers=1), "which is not the log"),
        (Defect.DECIDE_AGAIN_BLINDLY, (("s+",),), Faults(lost_responses=1), "has the events"),
        (Defect.FORGET_UNKNOWN_OUTCOME, (("s+",),), Faults(lost_responses=1, late_requests=1), "has the events"),
    ],
    ids=lambda value: value.name if isinstance(value, Defect) else "",
)
def test_append_protocol_without_one_rule_breaks_a_guarantee(
    defect: Defect, programs: Programs, faults: Faults, message: str
) -> None:
    violation, trace = find_violation(programs, faults, defect)
    assert message in violation
    assert any("fail over" in step for step in trace) == bool(faults.failovers)


def test_each_defect_is_searched_for() -> None:
    marks = getattr(test_append_protocol_without_one_rule_breaks_a_guarantee, "pytestmark")  # noqa: B009 - set by pytest
    assert {parameters[0] for parameters in marks[0].args[1]} == set(Defect) - {Defect.NONE}


def test_state_without_way_to_the_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader voids no gaps here, so the positions of a crashed writer stay empty."""
    monkeypatch.setattr(AppendModel, "_reader_steps", lambda _model, _state: iter(()))
    with pytest.raises(Violation, match="no step leads to the end"):
        AppendModel(ONE_STREAM, Faults(crashes=1)).check()
