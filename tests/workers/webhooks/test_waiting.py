"""Which delivery is tried next."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger.workers.webhooks.schedule import DeliveryLimits, DeliverySchedule, ScheduledDelivery

START = datetime(2026, 2, 1, 12, tzinfo=UTC)
FOREVER = START + timedelta(days=100)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def due(
    name: str, seconds: float = 0, host: str = "a:443", version: int = 1, give_up_at: datetime = FOREVER
) -> ScheduledDelivery:
    return ScheduledDelivery(at(seconds), name, version, host, give_up_at)


def names(found: list[ScheduledDelivery]) -> list[str]:
    return [it.delivery_id for it in found]


def waiting(*entries: ScheduledDelivery, **limits: int) -> DeliverySchedule:
    found = DeliverySchedule(DeliveryLimits(**limits))  # type: ignore[arg-type]
    for entry in entries:
        found.add(entry)
    return found


def test_nothing_is_tried_before_its_time_and_the_next_moment_is_known() -> None:
    them = waiting(due("late", 60), due("soon", 5))
    assert them.take_due(at(4.9)) == ([], [])
    assert them.next_due_at(at(4.9)) == at(5)
    assert names(them.take_due(at(5))[0]) == ["soon"]
    assert them.next_due_at(at(5)) == at(60)


def test_one_host_has_only_so_many_at_a_time_and_others_go_past_it() -> None:
    them = waiting(*(due(f"a{n}", host="a:1") for n in range(10)), due("b", 1, host="b:1"), max_concurrent_per_host=2)
    tried, _ = them.take_due(at(1))
    assert sorted(names(tried)) == ["a0", "a1", "b"]
    them.record_result(tried[0], is_responsive=True, now=at(2))
    assert len(them.take_due(at(2))[0]) == 1


def test_hosts_take_turns_when_all_together_are_too_many() -> None:
    them = waiting(
        *(due(f"{h}{n}", host=h) for h in "abc" for n in range(9)), max_concurrent=3, max_concurrent_per_host=9
    )
    tried, _ = them.take_due(START)
    assert sorted(it.host for it in tried) == ["a", "b", "c"]
    order = []
    for step in range(6):
        them.record_result(tried[0], is_responsive=True, now=at(step))
        [following] = them.take_due(at(step))[0]
        order.append(following.host)
        tried = [*tried[1:], following]
    assert sorted(order) == ["a", "a", "b", "b", "c", "c"]


def test_a_newer_state_replaces_the_older_and_what_was_dropped_is_not_tried() -> None:
    them = waiting(due("x"), due("y"))
    them.add(due("x", 30, version=2))
    them.remove("y")
    assert them.take_due(at(1)) == ([], [])
    [found] = them.take_due(at(30))[0]
    assert (found.delivery_id, found.version) == ("x", 2)


def test_a_silent_host_rests_then_one_is_tried_and_the_rest_doubles() -> None:
    them = waiting(*(due(f"d{n}") for n in range(9)), circuit_breaker_failures=3, max_concurrent_per_host=3)
    tried, _ = them.take_due(START)
    for entry in tried:
        them.record_result(entry, is_responsive=False, now=START)
    assert them.take_due(at(29.9)) == ([], [])
    assert them.next_due_at(at(29.9)) == at(30)
    [probe] = them.take_due(at(30))[0]
    assert them.take_due(at(31)) == ([], [])
    assert them.next_due_at(at(31)) is None, "nothing to wait for but the answer: a moment in the past would spin"
    them.record_result(probe, is_responsive=False, now=at(40))
    assert them.take_due(at(99)) == ([], [])
    [probe] = them.take_due(at(100))[0]
    them.record_result(probe, is_responsive=True, now=at(101))
    assert len(them.take_due(at(101))[0]) == 3


def test_a_rest_is_never_longer_than_ten_minutes() -> None:
    them, now, rest = waiting(circuit_breaker_failures=1, max_concurrent_per_host=1), START, timedelta()
    for number in range(12):
        them.add(due(f"d{number}"))
        [tried] = them.take_due(now)[0]
        them.record_result(tried, is_responsive=False, now=now)
        them.add(due("next"))
        assert them.take_due(now) == ([], [])
        rest = (them.next_due_at(now) or FOREVER) - now
        assert rest <= timedelta(minutes=10)
        them.remove("next")
        now += rest
    assert rest == timedelta(minutes=10)


def test_what_waits_for_a_resting_host_for_too_long_is_given_up() -> None:
    them = waiting(due("first"), circuit_breaker_failures=1)
    [first] = them.take_due(START)[0]
    them.add(due("old", 1, give_up_at=at(10)))
    them.add(due("young", 1))
    them.record_result(first, is_responsive=False, now=at(2))
    assert them.take_due(at(9)) == ([], [])
    tried, given_up = them.take_due(at(40))
    assert (names(tried), names(given_up)) == (["young"], ["old"])


def test_what_is_on_its_way_is_not_tried_a_second_time() -> None:
    them = waiting(due("x"))
    [trying] = them.take_due(START)[0]
    them.add(due("x", version=2))
    assert them.take_due(at(1)) == ([], [])
    them.record_result(trying, is_responsive=True, now=at(2))
    them.add(due("x", version=3))
    assert [it.version for it in them.take_due(at(2))[0]] == [3]


def test_forgetting_all_keeps_what_is_on_its_way_and_how_hosts_are() -> None:
    them = waiting(due("x"), due("y", 1), circuit_breaker_failures=1)
    [trying] = them.take_due(START)[0]
    them.clear()
    assert len(them) == 0
    them.record_result(trying, is_responsive=False, now=START)
    them.add(due("y"))
    assert them.take_due(at(1)) == ([], [])
    assert names(them.take_due(at(31))[0]) == ["y"]


@settings(max_examples=60)
@given(
    entries=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50)), max_size=40),
    answers=st.lists(st.booleans(), min_size=1, max_size=40),
    per_host=st.integers(1, 3),
)
def test_whatever_hosts_do_each_is_tried_once_within_the_limits(
    entries: list[tuple[str, int]], answers: list[bool], per_host: int
) -> None:
    them = waiting(
        *(due(f"d{n}", seconds, host) for n, (host, seconds) in enumerate(entries)),
        max_concurrent_per_host=per_host,
        max_concurrent=5,
        circuit_breaker_failures=2,
    )
    flying: list[ScheduledDelivery] = []
    seen: list[str] = []
    step = 0
    now = START
    while len(seen) < len(entries) or flying:
        tried, given_up = them.take_due(now)
        assert not given_up
        flying += tried
        seen += names(tried)
        assert len(flying) <= 5
        assert all(sum(it.host == host for it in flying) <= per_host for host in "abcd")
        if flying:
            them.record_result(flying.pop(0), is_responsive=answers[step % len(answers)], now=now)
            step += 1
            now += timedelta(seconds=1)
        else:
            following = them.next_due_at(now)
            assert following is not None, "some are left, and nothing will ever happen"
            assert following > now
            now = following
    assert sorted(seen) == sorted(f"d{n}" for n in range(len(entries)))
    assert len(them) == 0
