"""Request and response models of result files."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from pydantic import Field

from jobledger.api.schemas.request_models import RequestModel
from jobledger.api.schemas.response_models import SuccessResponse

_MAX_LIFETIME_SECONDS: Final = 30 * 86_400


class FileQuery(RequestModel):
    """How to send the file. `expires` and `signature` are parts of a signed link."""

    download: bool = False
    expires: str = ""
    signature: str = ""
    min_position: str | None = None


class LinkBody(RequestModel):
    """The lifetime of a signed link, in seconds."""

    expires_in_s: int = Field(3600, ge=1, le=_MAX_LIFETIME_SECONDS)


class SignedLinkResponse(SuccessResponse):
    """A link that opens the file without authentication."""

    url: str
    expires_at: datetime
