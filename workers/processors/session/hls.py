"""Download a recording that is published in segments (HLS). The fetcher checks each URL. FFmpeg opens none of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import m3u8
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CBC

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.fetcher import Fetcher, FetchResult
from jobledger.workers.processors.session.media_tracks import Track, normalize_language
from jobledger.workers.processors.session.partial_file import PartialFile
from jobledger.workers.processors.session.subtitles import MAX_SUBTITLE_BYTES, Cue, parse_subtitles, parse_timecode
from jobledger.workers.processors.session.transcript import TranscriptUnavailable, reject_html_type

MAX_PLAYLIST_BYTES: Final = 4 * 1024 * 1024
MAX_SEGMENTS: Final = 50_000
MAX_SEGMENT_BYTES: Final = 256 * 1024 * 1024
_CONCURRENT_DOWNLOADS: Final = 3
_MAX_ATTEMPTS: Final = 3
_RETRY_SECONDS: Final = 1.0
_MAX_MISSING_FRACTION: Final = 0.05
_BLOCK_BYTES: Final = 16
_MANIFEST_TYPES: Final = ("application/dash+xml", "application/vnd.ms-sstr+xml")
_TS_CLOCK: Final = 90_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a download. `max_seconds` is the length of the recording that is used."""

    max_bytes: int
    max_seconds: float
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class DownloadedMedia:
    """Size of the file, and the numbers of its segments and of those that could not be fetched."""

    size: int
    segments: int
    missing: int


class _Range(NamedTuple):
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the recording: a segment, or the header of the segments that follow."""

    url: str
    seconds: float = 0.0
    range: _Range | None = None
    key_url: str | None = None
    iv: bytes = b""


@dataclass(frozen=True, slots=True)
class Presentation:
    """The playlist of the sound of a recording, its length, and its subtitles if there are any in its language."""

    sound: Any
    seconds: float
    subtitles_url: str | None = None


def is_playlist(head: bytes) -> bool:
    """Return whether a file that begins with `head` is an HLS playlist."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"#EXTM3U")


def reject_manifest(head: bytes, media_type: str) -> None:
    """Reject formats of segmented media that are not supported.

    Raises:
        TranscriptUnavailable: It is a DASH or Smooth Streaming manifest.
    """
    if media_type in _MANIFEST_TYPES or b"<MPD" in head or b"<SmoothStreamingMedia" in head:
        raise TranscriptUnavailable(
            "The recording is a DASH or Smooth Streaming manifest, which is not supported. Use the URL of a media file "
            "or of an HLS playlist (.m3u8)."
        )


class HlsClient:
    """Reads playlists and downloads what they name."""

    def __init__(self, fetcher: Fetcher, limits: Limits, scratch: Path) -> None:
        """Initialize the client. `scratch` is a directory for temporary files."""
        self._fetcher = fetcher
        self._limits = limits
        self._scratch = scratch
        self._bytes_left = limits.max_bytes
        self._keys: dict[str, bytes] = {}
        self._deadline = asyncio.get_running_loop().time() + limits.timeout_seconds

    async def open(self, playlist: bytes, url: str, language: str) -> Presentation:
        """Return the playlists of the sound in `language` and of its subtitles.

        Raises:
            ProcessorError: A URL is rejected or cannot be fetched.
            TranscriptUnavailable: The playlist cannot be used.
        """
        parsed = await _parse_playlist(playlist, url)
        subtitles_url = None
        if parsed.is_variant:
            subtitles_url = _select_subtitles(parsed, language)
            parsed = await self._fetch_playlist(_select_sound(parsed, language))
        _check_media_playlist(parsed)
        return Presentation(parsed, sum(part.seconds for part in self._list_parts(parsed)), subtitles_url)

    async def download_sound(
        self, presentation: Presentation, target: Path, *, on_progress: Callable[[int, float], Awaitable[None]]
    ) -> DownloadedMedia:
        """Write the segments of the sound to the file `target`.

        Args:
            presentation: The playlists.
            target: The file to write.
            on_progress: Called after each segment with the bytes and seconds so far.

        Raises:
            ProcessorError: A URL is rejected or cannot be fetched.
            TranscriptUnavailable: The playlist cannot be used.
        """
        parts = self._list_parts(presentation.sound)
        seconds, size, missing = 0.0, 0, 0
        with await asyncio.to_thread(target.open, "wb") as file:
            async with aclosing(self._download_parts(parts)) as contents:
                async for part, content in contents:
                    if content is None:
                        missing += 1
                        if missing > max(1, _MAX_MISSING_FRACTION * len(parts)):
                            raise TranscriptUnavailable("Too many segments of the recording cannot be fetched.")
                    else:
                        size += await asyncio.to_thread(file.write, content)
                    seconds += part.seconds
                    await on_progress(size, seconds)
        if not size:
            raise TranscriptUnavailable("The segments of the recording are empty or cannot be fetched.")
        return DownloadedMedia(size, sum(part.seconds > 0 for part in parts), missing)

    def _list_parts(self, playlist: Any) -> list[_Part]:
        return list(_list_parts(playlist, self._limits.max_seconds))

    async def fetch_subtitles(self, presentation: Presentation) -> list[Cue]:
        """Return the cues of the subtitles.

        Raises:
            ProcessorError: A URL is rejected or cannot be fetched.
            TranscriptUnavailable: The playlist cannot be used.
        """
        if presentation.subtitles_url is None:
            return []
        playlist = await self._fetch_playlist(presentation.subtitles_url)
        _check_media_playlist(playlist)
        cues: dict[Cue, None] = {}
        first_offset: float | None = None
        size = 0
        async with aclosing(self._download_parts(self._list_parts(playlist))) as contents:
            async for _, content in contents:
                text = (content or b"").decode("utf-8", "replace")
                size += len(text)
                if size > MAX_SUBTITLE_BYTES:
                    break
                offset = _read_timestamp_map(text)
                first_offset = offset if first_offset is None else first_offset
                shift = offset - first_offset if offset is not None and first_offset is not None else 0.0
                for cue in parse_subtitles(text):
                    moved = Cue(round(cue.start_seconds + shift, 3), round(cue.end_seconds + shift, 3), cue.text)
                    cues[moved] = None  # a cue at the border is in both segments
        return list(cues)

    async def _fetch_playlist(self, url: str) -> Any:
        response = await self._fetch(url, max_bytes=MAX_PLAYLIST_BYTES)
        if not is_playlist(response.body):
            raise TranscriptUnavailable(f"{response.url} is not an HLS playlist.")
        return await _parse_playlist(response.body, response.url)

    async def _download_parts(self, parts: Sequence[_Part]) -> AsyncGenerator[tuple[_Part, bytes | None], None]:
        """Yield each part and its content, in order, or None if it cannot be fetched. Some are fetched at a time."""
        slices = _FileSlices(self._scratch / "segments", self._fetch_file)
        waiting, pending = deque(parts), deque[tuple[_Part, asyncio.Task[bytes | None]]]()
        try:
            while waiting or pending:
                while waiting and len(pending) < _CONCURRENT_DOWNLOADS:
                    part = waiting.popleft()
                    pending.append((part, asyncio.create_task(self._load_part(part, slices))))
                part, task = pending[0]
                content = await task
                pending.popleft()
                yield part, content
        finally:
            for _, task in pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in pending), return_exceptions=True)
            await asyncio.to_thread(slices.close)

    async def _load_part(self, part: _Part, slices: _FileSlices) -> bytes | None:
        try:
            if part.range is None:
                content = (await self._fetch(part.url, max_bytes=MAX_SEGMENT_BYTES)).body
                self._count_bytes(len(content))
            else:
                content = await slices.read(part.url, part.range)
        except ProcessorError as error:
            if part.seconds == 0 or error.code not in ("HTTP_ERROR", "NETWORK_ERROR", "FETCH_TIMEOUT"):
                raise
            return None
        if part.key_url is None or (part.seconds == 0 and content[4:8] == b"ftyp"):
            return content
        return _decrypt(content, await self._load_key(part.key_url), part.iv)

    async def _load_key(self, url: str) -> bytes:
        if url not in self._keys:
            self._keys[url] = (await self._fetch(url, max_bytes=1024)).body
        return self._keys[url]

    async def _fetch_file(self, url: str, target: Path) -> None:
        """Download a file of which segments are ranges."""
        response = await self._fetch(url, max_bytes=self._bytes_left, target=target)
        self._count_bytes(response.size)

    def _count_bytes(self, size: int) -> None:
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise TranscriptUnavailable(f"The recording is larger than {self._limits.max_bytes:,} bytes.")

    async def _fetch(self, url: str, *, max_bytes: int, target: Path | None = None) -> FetchResult:
        attempt, file = 1, PartialFile(target) if target is not None else None
        while True:
            seconds_left = self._deadline - asyncio.get_running_loop().time()
            if seconds_left <= 0:
                raise TranscriptUnavailable(
                    f"The recording was not fetched within {self._limits.timeout_seconds:g} seconds."
                )
            try:
                return await self._fetcher.fetch(
                    url,
                    max_bytes=max_bytes,
                    timeout_seconds=seconds_left,
                    target=file,
                    check_media_type=reject_html_type,
                )
            except ProcessorError as error:
                if not error.transient or attempt == _MAX_ATTEMPTS:
                    raise
            await asyncio.sleep(_RETRY_SECONDS * attempt)
            attempt += 1


class _FileSlices:
    """Reads ranges of files. Each file is downloaded once and kept until another one is needed."""

    def __init__(self, target: Path, fetch: Callable[[str, Path], Awaitable[None]]) -> None:
        self._target = target
        self._fetch = fetch
        self._url: str | None = None
        self._lock = asyncio.Lock()

    async def read(self, url: str, part: _Range) -> bytes:
        async with self._lock:
            if url != self._url:
                self._url = None
                await self._fetch(url, self._target)
                self._url = url
            return await asyncio.to_thread(self._read, part)

    def _read(self, part: _Range) -> bytes:
        with self._target.open("rb") as file:
            file.seek(part.offset)
            return file.read(min(part.length, MAX_SEGMENT_BYTES))

    def close(self) -> None:
        self._target.unlink(missing_ok=True)


async def _parse_playlist(content: bytes, url: str) -> Any:
    if len(content) > MAX_PLAYLIST_BYTES:
        raise TranscriptUnavailable(f"The playlist of the recording is larger than {MAX_PLAYLIST_BYTES:,} bytes.")
    text = content.decode("utf-8-sig", "replace")
    try:
        return await asyncio.to_thread(m3u8.loads, text, uri=url)
    except Exception as error:  # any of them - the parser raises exceptions of many types
        raise TranscriptUnavailable("The playlist of the recording is invalid.") from error


def _select_sound(playlist: Any, language: str) -> str:
    """Return the URL of the playlist with the sound: a separate track, or else the smallest variant."""
    variants = sorted(playlist.playlists, key=lambda variant: variant.stream_info.bandwidth or 0)
    if not variants:
        raise TranscriptUnavailable("The playlist of the recording has no variants.")
    with_sound = [variant for variant in variants if _may_have_sound(variant)] or variants
    group = with_sound[0].stream_info.audio
    renditions = [media for media in playlist.media if media.type == "AUDIO" and media.group_id]
    if renditions:
        best = min(renditions, key=lambda media: (_rank_rendition(media, language), media.group_id != group))
        if best.uri:
            return str(best.absolute_uri)
        # The sound of this track is in the variants of its group.
        with_sound = [v for v in with_sound if v.stream_info.audio == best.group_id] or with_sound
    return str(with_sound[0].absolute_uri)


def _may_have_sound(variant: Any) -> bool:
    codecs = [codec.strip().lower() for codec in (variant.stream_info.codecs or "").split(",") if codec.strip()]
    prefixes = ("mp4a", "ac-3", "ec-3", "opus", "flac", "vorbis", "alac")
    return not codecs or any(codec.startswith(prefixes) for codec in codecs)


def _select_subtitles(playlist: Any, language: str) -> str | None:
    candidates = [
        media
        for media in playlist.media
        if media.type == "SUBTITLES"
        and media.uri
        and media.forced != "YES"
        and normalize_language(media.language) == normalize_language(language)
    ]
    best = min(candidates, key=lambda media: _rank_rendition(media, language), default=None)
    return None if best is None else str(best.absolute_uri)


def _rank_rendition(media: Any, language: str) -> tuple[int, bool]:
    return Track(
        language=media.language,
        title=media.name or "",
        is_default=media.default == "YES",
        is_alternative="describes-video" in (media.characteristics or ""),
    ).rank(language)


def _check_media_playlist(playlist: Any) -> None:
    if playlist.is_variant:
        raise TranscriptUnavailable("The playlist of the recording names another list of variants.")
    if not playlist.is_endlist and (playlist.playlist_type or "").upper() != "VOD":
        raise TranscriptUnavailable(
            "The recording is a live stream that has not ended. Restart the job when it has ended."
        )
    if not playlist.segments:
        raise TranscriptUnavailable("The playlist of the recording has no segments.")
    if len(playlist.segments) > MAX_SEGMENTS:
        raise TranscriptUnavailable(f"The recording has more than {MAX_SEGMENTS:,} segments.")


def _list_parts(playlist: Any, max_seconds: float) -> Iterator[_Part]:
    """Yield the parts of the first `max_seconds`, each with the header that it needs before it."""
    header: tuple[str, str | None] | None = None
    ends: dict[str, int] = {}
    seconds = 0.0
    for number, segment in enumerate(playlist.segments, playlist.media_sequence or 0):
        if seconds > max_seconds:
            return
        key_url, iv = _read_key(segment.key, number)
        section = segment.init_section
        if section is not None and header != (section.absolute_uri, section.byterange):
            header = section.absolute_uri, section.byterange
            yield _Part(section.absolute_uri, 0.0, _read_range(section.byterange, 0), key_url, iv)
        duration = segment.duration or 0.0
        url = segment.absolute_uri
        part_range = _read_range(segment.byterange, ends.get(url, 0))
        if part_range is not None:
            ends[url] = part_range.offset + part_range.length
        if 0 < duration < float("inf") and not segment.gap_tag:
            yield _Part(url, duration, part_range, key_url, iv)
        seconds += max(0.0, duration)


def _read_range(text: str | None, previous_end: int) -> _Range | None:
    """Return the range `length@offset`. It begins at the end of the previous one if it has no offset."""
    if not text:
        return None
    length, _, offset = text.strip('"').partition("@")
    numbers = offset or str(previous_end), length
    if not all(number.isascii() and number.isdigit() and len(number) < 16 for number in numbers):
        raise TranscriptUnavailable("The playlist of the recording has an invalid byte range.")
    return _Range(*map(int, numbers))


def _read_key(key: Any, number: int) -> tuple[str | None, bytes]:
    """Return URL of the key and initialization vector of segment `number`."""
    method = (key.method if key is not None else None) or "NONE"
    if method == "NONE":
        return None, b""
    if method != "AES-128" or (key.keyformat or "identity") != "identity":
        raise TranscriptUnavailable("The recording is protected (DRM) and cannot be decoded.")
    try:
        iv = bytes.fromhex(key.iv[2:].zfill(32)) if key.iv else (number % (1 << 128)).to_bytes(_BLOCK_BYTES, "big")
    except ValueError as error:
        raise TranscriptUnavailable("The playlist of the recording has an invalid initialization vector.") from error
    return key.absolute_uri, iv


def _decrypt(content: bytes, key: bytes, iv: bytes) -> bytes:
    """Return the content that is encrypted with AES-128 in CBC mode with PKCS #7 padding."""
    if len(key) != _BLOCK_BYTES or len(iv) != _BLOCK_BYTES or len(content) % _BLOCK_BYTES or not content:
        raise TranscriptUnavailable("A segment of the recording or its key is damaged and cannot be decrypted.")
    decryptor = Cipher(AES128(key), CBC(iv)).decryptor()
    plain = decryptor.update(content) + decryptor.finalize()
    padding = plain[-1]
    return plain[:-padding] if 1 <= padding <= _BLOCK_BYTES else plain


def _read_timestamp_map(text: str) -> float | None:
    """Return the time of `LOCAL` 0 in the clock of the media, from the header X-TIMESTAMP-MAP of WebVTT."""
    line = next((line for line in text[:1000].splitlines() if line.startswith("X-TIMESTAMP-MAP=")), None)
    if line is None:
        return None
    values = dict(item.partition(":")[::2] for item in line.removeprefix("X-TIMESTAMP-MAP=").split(","))
    try:
        return int(values["MPEGTS"]) / _TS_CLOCK - parse_timecode(values["LOCAL"])
    except (KeyError, ValueError, OverflowError):
        return None
