"""Tests of the delivery schedule: which delivery is tried next, within the limits of hosts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger.workers.settings import WebhookSettings
from jobledger.workers.webhooks.schedule import DeliverySchedule, ScheduledDelivery

START = datetime(2026, 2, 1, 12, tzinfo=UTC)
FOREVER = START + timedelta(days=100)


def after_start(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def make_delivery(
    name: str, seconds: float = 0, host: str = "a:443", version: int = 1, give_up_at: datetime = FOREVER
) -> ScheduledDelivery:
    return ScheduledDelivery(after_start(seconds), name, version, host, give_up_at)


def list_ids(deliveries: list[ScheduledDelivery]) -> list[str]:
    return [delivery.delivery_id for delivery in deliveries]


def make_schedule(*entries: ScheduledDelivery, **limits: Any) -> DeliverySchedule:
    schedule = DeliverySchedule(WebhookSettings(**limits))
    for entry in entries:
        schedule.add(entry)
    return schedule


def test_delivery_before_its_time_is_not_due_and_next_time_is_reported() -> None:
    schedule = make_schedule(make_delivery("late", 60), make_delivery("soon", 5))
    assert schedule.take_due(after_start(4.9)) == ([], [])
    assert schedule.get_next_due_at(after_start(4.9)) == after_start(5)
    assert list_ids(schedule.take_due(after_start(5))[0]) == ["soon"]
    assert schedule.get_next_due_at(after_start(5)) == after_start(60)


def test_host_limit_holds_back_its_deliveries_but_not_other_hosts() -> None:
    schedule = make_schedule(
        *(make_delivery(f"a{n}", host="a:1") for n in range(10)),
        make_delivery("b", 1, host="b:1"),
        max_concurrent_per_host=2,
    )
    tried, _ = schedule.take_due(after_start(1))
    assert sorted(list_ids(tried)) == ["a0", "a1", "b"]
    schedule.record_result(tried[0], is_responsive=True, now=after_start(2))
    assert len(schedule.take_due(after_start(2))[0]) == 1


def test_total_limit_gives_hosts_equal_turns() -> None:
    schedule = make_schedule(
        *(make_delivery(f"{host}{n}", host=host) for host in "abc" for n in range(9)),
        max_concurrent=3,
        max_concurrent_per_host=9,
    )
    tried, _ = schedule.take_due(START)
    assert sorted(delivery.host for delivery in tried) == ["a", "b", "c"]
    order = []
    for step in range(6):
        schedule.record_result(tried[0], is_responsive=True, now=after_start(step))
        [next_delivery] = schedule.take_due(after_start(step))[0]
        order.append(next_delivery.host)
        tried = [*tried[1:], next_delivery]
    assert sorted(order) == ["a", "a", "b", "b", "c", "c"]


def test_newer_version_replaces_older_and_removed_delivery_is_not_due() -> None:
    schedule = make_schedule(make_delivery("x"), make_delivery("y"))
    schedule.add(make_delivery("x", 30, version=2))
    schedule.remove("y")
    assert schedule.take_due(after_start(1)) == ([], [])
    [delivery] = schedule.take_due(after_start(30))[0]
    assert (delivery.delivery_id, delivery.version) == ("x", 2)


def test_unresponsive_host_gets_one_probe_after_a_doubling_cooldown() -> None:
    schedule = make_schedule(
        *(make_delivery(f"d{n}") for n in range(9)), circuit_breaker_failures=3, max_concurrent_per_host=3
    )
    tried, _ = schedule.take_due(START)
    for entry in tried:
        schedule.record_result(entry, is_responsive=False, now=START)
    assert schedule.take_due(after_start(29.9)) == ([], [])
    assert schedule.get_next_due_at(after_start(29.9)) == after_start(30)
    [probe] = schedule.take_due(after_start(30))[0]
    assert schedule.take_due(after_start(31)) == ([], [])
    assert schedule.get_next_due_at(after_start(31)) is None, (
        "only the response of the probe matters: a time in the past would cause a busy loop"
    )
    schedule.record_result(probe, is_responsive=False, now=after_start(40))
    assert schedule.take_due(after_start(99)) == ([], [])
    [probe] = schedule.take_due(after_start(100))[0]
    schedule.record_result(probe, is_responsive=True, now=after_start(101))
    assert len(schedule.take_due(after_start(101))[0]) == 3


def test_cooldown_of_a_host_is_at_most_ten_minutes() -> None:
    schedule = make_schedule(circuit_breaker_failures=1, max_concurrent_per_host=1)
    now, cooldown = START, timedelta()
    for number in range(12):
        schedule.add(make_delivery(f"d{number}"))
        [tried] = schedule.take_due(now)[0]
        schedule.record_result(tried, is_responsive=False, now=now)
        schedule.add(make_delivery("next"))
        assert schedule.take_due(now) == ([], [])
        cooldown = (schedule.get_next_due_at(now) or FOREVER) - now
        assert cooldown <= timedelta(minutes=10)
        schedule.remove("next")
        now += cooldown
    assert cooldown == timedelta(minutes=10)


def test_delivery_past_its_deadline_during_a_cooldown_is_abandoned() -> None:
    schedule = make_schedule(make_delivery("first"), circuit_breaker_failures=1)
    [first] = schedule.take_due(START)[0]
    schedule.add(make_delivery("old", 1, give_up_at=after_start(10)))
    schedule.add(make_delivery("young", 1))
    schedule.record_result(first, is_responsive=False, now=after_start(2))
    assert schedule.take_due(after_start(9)) == ([], [])
    tried, given_up = schedule.take_due(after_start(40))
    assert (list_ids(tried), list_ids(given_up)) == (["young"], ["old"])


def test_delivery_in_flight_is_not_due_again() -> None:
    schedule = make_schedule(make_delivery("x"))
    [delivery] = schedule.take_due(START)[0]
    schedule.add(make_delivery("x", version=2))
    assert schedule.take_due(after_start(1)) == ([], [])
    schedule.record_result(delivery, is_responsive=True, now=after_start(2))
    schedule.add(make_delivery("x", version=3))
    assert [delivery.version for delivery in schedule.take_due(after_start(2))[0]] == [3]


def test_clear_keeps_deliveries_in_flight_and_host_states() -> None:
    schedule = make_schedule(make_delivery("x"), make_delivery("y", 1), circuit_breaker_failures=1)
    [delivery] = schedule.take_due(START)[0]
    schedule.clear()
    assert not schedule._current
    assert schedule.take_due(after_start(2)) == ([], [])
    schedule.record_result(delivery, is_responsive=False, now=START)
    schedule.add(make_delivery("y"))
    assert schedule.take_due(after_start(1)) == ([], [])
    assert list_ids(schedule.take_due(after_start(31))[0]) == ["y"]


@settings(max_examples=60)
@given(
    entries=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50)), max_size=40),
    responses=st.lists(st.booleans(), min_size=1, max_size=40),
    per_host=st.integers(1, 3),
)
def test_each_delivery_is_tried_once_within_the_limits_for_any_responses(
    entries: list[tuple[str, int]], responses: list[bool], per_host: int
) -> None:
    schedule = make_schedule(
        *(make_delivery(f"d{n}", seconds, host) for n, (host, seconds) in enumerate(entries)),
        max_concurrent_per_host=per_host,
        max_concurrent=5,
        circuit_breaker_failures=2,
    )
    in_flight: list[ScheduledDelivery] = []
    tried_ids: list[str] = []
    step = 0
    now = START
    while len(tried_ids) < len(entries) or in_flight:
        tried, given_up = schedule.take_due(now)
        assert not given_up
        in_flight += tried
        tried_ids += list_ids(tried)
        assert len(in_flight) <= 5
        assert all(sum(delivery.host == host for delivery in in_flight) <= per_host for host in "abcd")
        if in_flight:
            schedule.record_result(in_flight.pop(0), is_responsive=responses[step % len(responses)], now=now)
            step += 1
            now += timedelta(seconds=1)
        else:
            next_due_at = schedule.get_next_due_at(now)
            assert next_due_at is not None, "deliveries are left, but none will ever be due"
            assert next_due_at > now
            now = next_due_at
    assert sorted(tried_ids) == sorted(f"d{n}" for n in range(len(entries)))
    assert not schedule._current
    assert schedule.take_due(now) == ([], [])
    assert schedule.get_next_due_at(now) is None
