"""The live workers and what they run, for statistics and metrics."""

from __future__ import annotations

from jobledger.ledger.mongo.connection import Database, Document, translate_errors
from jobledger.ledger.mongo.lease import EXPIRED_LEASE_FILTER
from jobledger.projections.slots import Views
from jobledger.projections.views import jobs


async def list_live_workers(db: Database, views: Views) -> list[Document]:
    """Return the workers that hold a lease, with their slots and how many of them are busy."""
    with translate_errors("reading the workers"):
        alive = {"released": False, "$nor": [EXPIRED_LEASE_FILTER]}
        fields = {"host": 1, "slots": 1, "lease_until": 1, "problem": 1, "unhealthy_since": 1}
        workers = await db.workers.find(alive, fields, sort=[("_id", 1)]).to_list()
    busy = await jobs.count_running_by_worker(views) if workers else {}
    return [
        {
            "worker_id": worker["_id"],
            "host": worker["host"],
            "slots": worker["slots"],
            "busy_slots": busy.get(worker["_id"], 0),
            "lease_until": worker["lease_until"],
            "problem": worker.get("problem"),
            "unhealthy_since": worker.get("unhealthy_since"),
        }
        for worker in workers
    ]
