"""Settings of the worker and the webhook sender: the sections `event_worker` and `webhooks` of config.yaml."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from jobledger.ledger.net.url_policy import validate_host_or_network
from jobledger.ledger.system.settings_section import SettingsSection
from jobledger.workers.registry import get_unusable_job_types, load_processors
from jobledger.workers.sandbox.confinement import ConfinementSettings


def _check_job_types(limits: dict[str, int]) -> dict[str, int]:
    for name in limits:
        if name not in load_processors() and name not in get_unusable_job_types():
            raise ValueError(f"unknown job type {name!r}. Installed job types: {', '.join(sorted(load_processors()))}")
    return limits


class WorkerSettings(ConfinementSettings):
    """The section `event_worker`."""

    max_concurrent: int = Field(5, ge=1, le=1000)
    max_concurrent_per_type: Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_check_job_types)] = (
        Field({})
    )
    lease_seconds: float = Field(10, ge=1, le=3600)
    shutdown_grace_seconds: float = Field(30, ge=0, le=86_400)
    memory_limit_mb: int = Field(4096, ge=256)
    scratch_dir: Path | None = None
    scratch_min_free_mb: float = Field(100, ge=0, le=1_000_000_000)
    retry_base_seconds: float = Field(5, gt=0, le=3600)
    retry_max_seconds: float = Field(600, gt=0, le=86_400)
    poll_interval_sec: float | None = None


class WebhookSettings(SettingsSection):
    """The section `webhooks`."""

    retry_delays_seconds: list[Annotated[float, Field(ge=0, le=7 * 86_400)]] = Field(
        [0, 5, 300, 1800, 7200, 18_000, 36_000, 86_400], min_length=1, max_length=50
    )
    jitter: float = Field(0.1, ge=0, le=1)
    timeout_seconds: float = Field(10, ge=0.1, le=120)
    max_concurrent: int = Field(20, ge=1, le=1000)
    max_concurrent_per_host: int = Field(4, ge=1, le=1000)
    circuit_breaker_failures: int = Field(10, ge=1, le=1000)
    circuit_breaker_cooldown_seconds: float = Field(30, ge=0.1, le=600)
    allowed_private_hosts: list[Annotated[str, AfterValidator(validate_host_or_network)]] = Field([])
    echo_enabled: bool = False
    lease_seconds: float = Field(10, ge=1, le=3600)

    @property
    def max_age(self) -> timedelta:
        """Age after which a delivery that had to wait for its host is abandoned."""
        return timedelta(seconds=sum(self.retry_delays_seconds) * (1 + self.jitter) + 60)
