# Generated from client/asynchronous/files.py by `make reference`. Change that file instead.
"""Download files. After a lost connection, a download continues where it ended."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final
from uuid import uuid4

from jobledger.client.errors import ClientError, UnexpectedResponseError
from jobledger.client.resources import RemoteFile
from jobledger.client.settings import RECONNECT_SECONDS, RetrySchedule
from jobledger.client.synchronous.runtime import run_blocking, sleep
from jobledger.client.synchronous.transport import Call, Transport

_CHUNK_BYTES: Final = 256 * 1024


def download_file(transport: Transport, remote: RemoteFile, to: Path) -> Path:
    """Save a file of the API, and return its path. The file appears when it is complete.

    Args:
        transport: Sends the requests.
        remote: The file.
        to: The path to save to. If it is a directory, the file keeps its name.
    """
    target = to / remote.name if run_blocking(to.is_dir) else to
    temporary = target.with_name(f".{target.name[:100]}.{uuid4().hex}.part")
    try:
        with run_blocking(temporary.open, "xb+") as file:
            _fetch(transport, remote, file, max_bytes=None)
        run_blocking(temporary.replace, target)
    finally:
        run_blocking(temporary.unlink, missing_ok=True)
    return target


def read_file(transport: Transport, remote: RemoteFile, *, max_bytes: int) -> bytes:
    """Return the content of a file of the API.

    Raises:
        ValueError: It has more than `max_bytes` bytes.
    """
    buffer = BytesIO()
    _fetch(transport, remote, buffer, max_bytes=max_bytes)
    return buffer.getvalue()


def _fetch(transport: Transport, remote: RemoteFile, file: BinaryIO, *, max_bytes: int | None) -> None:
    """Write a file of the API to a local file.

    Raises:
        UnexpectedResponseError: Its digest is not the expected one.
        ValueError: It has more than `max_bytes` bytes.
    """
    schedule, tag = RetrySchedule(seconds=RECONNECT_SECONDS), ""
    while True:
        size = run_blocking(file.tell)
        headers = {"Range": f"bytes={size}-", "If-Range": tag} if size and tag else {}
        try:
            with transport.open(Call("GET", remote.path, headers=headers, is_view=True)) as response:
                if response.status_code != 206:
                    size = 0
                tag = response.headers.get("etag", "")
                tag = "" if tag.startswith("W/") else tag
                run_blocking(_truncate, file, size)
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    size += len(chunk)
                    if max_bytes is not None and size > max_bytes:
                        raise ValueError(
                            f"{remote.path} has more than {max_bytes} bytes: use download(), or raise max_bytes"
                        )
                    run_blocking(file.write, chunk)
                    schedule.reset()
            break
        except ClientError as error:
            delay = schedule.next_delay(error)
        sleep(delay)
    if remote.sha256 is not None and run_blocking(_compute_digest, file) != remote.sha256:
        raise UnexpectedResponseError(
            f"{remote.path} has another content than the results say: its SHA-256 is not {remote.sha256}."
        )


def _truncate(file: BinaryIO, size: int) -> None:
    file.seek(size)
    file.truncate()


def _compute_digest(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
