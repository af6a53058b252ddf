"""The HTTP settings of the API: rate limits, trusted proxies, CORS and logging."""

from __future__ import annotations

from dataclasses import dataclass

from jobledger.api.http.client_address import Network


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """HTTP settings of the API. A limit of 0 means no limit.

    Attributes:
        cors_origins: Origins whose pages may call the API.
        requests_per_second: Sustained request rate of one user, or of one address without a user.
        burst: Requests that a client may send at once.
        max_streams_per_user: Open live streams of one user, or of one address without a user.
        max_streams: Open live streams in this process.
        auth_failures_per_minute: Failed authentication attempts of one address.
        trusted_proxies: Networks of the proxies whose X-Forwarded-For header is used.
        is_https: Whether clients reach the API over HTTPS.
        access_log: Whether each request is logged.
    """

    cors_origins: tuple[str, ...] = ()
    requests_per_second: float = 0
    burst: int = 50
    max_streams_per_user: int = 0
    max_streams: int = 0
    auth_failures_per_minute: int = 0
    trusted_proxies: tuple[Network, ...] = ()
    is_https: bool = False
    access_log: bool = False

    @property
    def session_cookie_name(self) -> str:
        """The name of the session cookie. The prefix `__Host-` protects it, but needs https."""
        return "__Host-jobledger" if self.is_https else "jobledger"
