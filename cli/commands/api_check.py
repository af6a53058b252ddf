"""Check of `jobledger doctor` on the API."""

from __future__ import annotations

from jobledger.cli.checks.result import CheckResult
from jobledger.cli.commands.api_client import RequestRejected, open_client, parse_response
from jobledger.ledger.domain.errors import JobledgerError, LedgerUnavailable


def check_api(url: str, *, is_required: bool) -> CheckResult:
    """Check whether the API is ready.

    Args:
        url: URL of the API.
        is_required: Whether an API that does not respond is a problem. On other machines than that of the API, the
            default URL has none.
    """
    try:
        with open_client(url) as client:
            ready = parse_response(client.get("/readyz"))
    except (LedgerUnavailable, RequestRejected) as error:
        if is_required:
            return CheckResult("API", is_ok=False, detail=f"{url} is not ready", advice=str(error))
        return CheckResult("API", is_ok=True, detail=f"none at {url}. To check another one, set --url (JOBLEDGER_URL)")
    except JobledgerError as error:
        return CheckResult("API", is_ok=False, detail="not checked", advice=str(error))
    warning = f". Note: {ready['warning']}" if ready.get("warning") else ""
    return CheckResult("API", is_ok=True, detail=f"{url} is ready{warning}")
