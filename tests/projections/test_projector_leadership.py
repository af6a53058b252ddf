"""One projector leads. A standby takes over, and a former leader writes nothing."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo import transactions
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.mongo.leader_election import LeaderElection, LeadershipLost
from jobledger.ledger.store.event_store import ReadPosition
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID
from jobledger.projections.engine.projector import Projector
from jobledger.projections.engine.writer import ProjectionWriter
from tests.projections.expected_views import assert_views_match_log, load_views, run_random_history
from tests.support.message_proxy import MessageProxy
from tests.support.mongodb_provider import transaction_lifetime
from tests.support.polling import DEADLINE_SECONDS
from tests.support.role_runner import RunningRoles, run_roles_in_process, run_roles_subprocess

LONG_LEASE_SECONDS = 300.0
LONG_TRANSACTION_SECONDS = 300
PROMPT_SECONDS = 60.0
"""A standby would try again by itself only after 101 s (a third of the long lease, and a second)."""
SHORT_LEASE_SECONDS = 1.5
TAKEOVER_SECONDS = SHORT_LEASE_SECONDS + SHORT_LEASE_SECONDS / 3 + 1
NOISE_SECONDS = 15.0
"""For a loaded machine. Not a promise."""


async def load_fencing_token(db: Database) -> int:
    checkpoint = await db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID})
    assert checkpoint is not None
    return int(checkpoint["fencing_token"])


class HangingWriter(ProjectionWriter):
    """Loads the documents and then waits forever, before its transaction. Keeps the events of the chunk."""

    pending_events: Sequence[RecordedEvent]

    async def apply(self, events: Sequence[RecordedEvent], **options: Any) -> list[Document]:
        self.pending_events = events
        await self._loader.load(events, unwritten=None, position=self.position)
        HangingProjector.reached.set()
        return await asyncio.Future()


class HangingProjector(Projector):
    """A projector with a HangingWriter."""

    reached: asyncio.Event
    writer: HangingWriter

    async def _take_over(self) -> ProjectionWriter:
        writer = await super()._take_over()
        self.writer = HangingWriter(
            self._db,
            writer.views,
            checkpoint_id=writer._checkpoint_id,
            checkpoint_filter=writer._checkpoint_filter,
            last_applied=writer.last_applied,
        )
        return self.writer


async def test_transaction_of_a_former_leader_is_rejected(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HangingProjector, "reached", asyncio.Event(), raising=False)
    async with run_roles_in_process(connection, store, projector=True, projector_class=HangingProjector) as first:
        assert isinstance(first.projector, HangingProjector)
        await first.submit({"track": "A"})
        await asyncio.wait_for(HangingProjector.reached.wait(), DEADLINE_SECONDS)
        # Its lease expires, and another process leads.
        await first.db.leaders.update_one({}, [{"$set": {"lease_until": "$$NOW"}}])
        async with run_roles_in_process(connection, store, projector=True) as second:
            await second.wait_for_views(1)
            await second.submit({"track": "B"})
            await second.wait_for_views(2)
            before = await load_views(first.db)
            with pytest.raises(LeadershipLost):
                await ProjectionWriter.apply(first.projector.writer, first.projector.writer.pending_events)
            assert await load_views(first.db) == before
            await assert_views_match_log(second)


async def test_lost_leadership_is_logged_with_reason(connection: Connection) -> None:
    losses = [LeadershipLost(), LeadershipLost("its lease was lost")]

    async def lead() -> None:
        if losses:
            raise losses.pop(0)

    election = LeaderElection(connection, "projector", holder="test", lease_seconds=LONG_LEASE_SECONDS)
    with capture_logs() as logs:
        await election.run_once(lead)
    lost = [(entry["task"], entry["reason"]) for entry in logs if entry["event"] == "leadership lost, standing by"]
    assert lost == [("projector", "another process is the leader"), ("projector", "its lease was lost")]


async def test_second_writer_with_the_same_fencing_token_is_rejected(connection: Connection, store: Path) -> None:
    """The update of the checkpoint requires the position before the chunk, so the same chunk is rejected."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit({"track": "A"})
        await roles.wait_for_views(1)
        before = await load_views(roles.db)
        views = roles.checkpoint.views
        second_writer = ProjectionWriter(
            roles.db,
            views,
            checkpoint_id=VIEWS_CHECKPOINT_ID,
            checkpoint_filter={"fencing_token": 1, "slots": views.slots},
            last_applied=ReadPosition(0),
        )
        with pytest.raises(LeadershipLost):
            await second_writer.apply(await roles.read_all_events())
        assert await load_views(roles.db) == before


async def test_standby_leads_at_once_when_the_leader_releases_its_lease(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, projector_lease_seconds=LONG_LEASE_SECONDS
    ) as first:
        await first.submit()
        await first.wait_for_views(1)
        async with run_roles_in_process(
            connection, store, projector=True, projector_lease_seconds=LONG_LEASE_SECONDS
        ) as second:
            assert first.projector_task is not None
            first.projector_task.cancel()
            await asyncio.gather(first.projector_task, return_exceptions=True)
            await second.submit()
            await second.wait_for_views(2, seconds=PROMPT_SECONDS)


async def test_standby_notices_a_release_right_after_its_rejection(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, projector_lease_seconds=LONG_LEASE_SECONDS
    ) as first:
        await first.submit()
        await first.wait_for_views(1)
        async with run_roles_in_process(connection, store, projector_lease_seconds=LONG_LEASE_SECONDS) as second:
            assert first.projector_task is not None
            leader = first.projector_task
            standby = Projector(
                second.db,
                second.event_store,
                connection,
                second.checkpoint,
                holder="standby",
                lease_seconds=LONG_LEASE_SECONDS,
            )
            acquire = standby._leader_election._lease.acquire

            async def acquire_and_stop_leader(facts: Any, **options: Any) -> bool:
                taken = await acquire(facts, **options)
                if not leader.done():  # after the rejection, and before the standby waits
                    leader.cancel()
                    await asyncio.gather(leader, return_exceptions=True)
                    standby._leader_election.on_change(
                        {
                            "documentKey": {"_id": "projector"},
                            "updateDescription": {"updatedFields": {"released": True}},
                        }
                    )
                return taken

            monkeypatch.setattr(standby._leader_election._lease, "acquire", acquire_and_stop_leader)
            standby_task = asyncio.create_task(standby.run())
            await asyncio.wait([leader], timeout=PROMPT_SECONDS)
            assert leader.done()
            await second.submit()
            await second.wait_for_views(2, seconds=PROMPT_SECONDS)
            assert not standby_task.done()
            standby_task.cancel()
            await asyncio.gather(standby_task, return_exceptions=True)


@asynccontextmanager
async def stopped_within_a_transaction(
    mongodb_uri: str, connection: Connection, store: Path, *, wait_seconds: float | None
) -> AsyncIterator[RunningRoles]:
    """Cancel a leader while the first statement of its transaction is on its way, and yield another process.

    The statement reaches the server after `wait_seconds`, or never. The leader has stopped before the block. The server
    keeps open transactions for minutes.
    """
    with transaction_lifetime(mongodb_uri, LONG_TRANSACTION_SECONDS), MessageProxy(mongodb_uri) as proxy:
        async with (
            run_roles_in_process(connection, store) as roles,
            run_roles_in_process(replace(connection, uri=proxy.uri), store, projector=True) as leader,
        ):
            await roles.submit()
            await roles.wait_for_views(1)
            proxy.hold_request("update")
            await roles.submit()
            assert await asyncio.to_thread(proxy.message_held.wait, DEADLINE_SECONDS)
            assert leader.projector_task is not None
            leader.projector_task.cancel()
            released = asyncio.Event()
            if wait_seconds is not None:
                loop = asyncio.get_running_loop()
                loop.call_later(wait_seconds, proxy.release_request)
                loop.call_later(wait_seconds, released.set)
            await asyncio.wait({leader.projector_task}, timeout=DEADLINE_SECONDS)
            assert leader.projector_task.done()
            if wait_seconds is None:
                proxy.close_connections()  # the held statement never arrives
            else:
                await released.wait()
                await asyncio.sleep(0.2)  # the statement arrives, even if the leader has not waited for it
            yield roles


async def test_leader_stopped_within_a_transaction_does_not_leave_it_open(
    mongodb_uri: str, connection: Connection, store: Path
) -> None:
    async with (
        stopped_within_a_transaction(mongodb_uri, connection, store, wait_seconds=0.5) as roles,
        run_roles_in_process(connection, store, projector=True),
    ):
        await roles.submit()
        await roles.wait_for_views(3, seconds=PROMPT_SECONDS)
        await assert_views_match_log(roles)


async def test_leader_stops_although_its_transaction_never_ends(
    mongodb_uri: str, connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "CANCEL_TIMEOUT_SECONDS", 0.5)
    async with (
        stopped_within_a_transaction(mongodb_uri, connection, store, wait_seconds=None) as roles,
        run_roles_in_process(connection, store, projector=True),
    ):
        await roles.wait_for_views(2)


async def test_standby_leads_after_the_lease_of_a_killed_leader_expired(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        with run_roles_subprocess(connection, store, "projector", lease_seconds=SHORT_LEASE_SECONDS) as leader:
            await leader.wait_until_started()
            await roles.submit()
            await roles.wait_for_views(1)
            async with run_roles_in_process(
                connection, store, projector=True, projector_lease_seconds=SHORT_LEASE_SECONDS
            ):
                first_token = await load_fencing_token(roles.db)
                leader.send_signal(signal.SIGKILL)
                await leader.wait_for_exit()
                await roles.submit()
                await roles.wait_for_views(2, seconds=TAKEOVER_SECONDS + NOISE_SECONDS)
                assert await load_fencing_token(roles.db) > first_token
                await assert_views_match_log(roles)


async def test_suspended_leader_writes_nothing_after_it_resumes(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        with run_roles_subprocess(connection, store, "projector", lease_seconds=SHORT_LEASE_SECONDS) as leader:
            await leader.wait_until_started()
            await roles.submit({"track": "A"})
            await roles.wait_for_views(1)
            leader.send_signal(signal.SIGSTOP)
            await roles.submit({"track": "A"})
            async with run_roles_in_process(
                connection, store, projector=True, projector_lease_seconds=SHORT_LEASE_SECONDS
            ):
                await roles.wait_for_views(2)
                leader.send_signal(signal.SIGCONT)
                await run_random_history(roles, random.Random(7), steps=10)
                await assert_views_match_log(roles)
