"""Read from the structure of a media file whether its end is missing. The media are not decoded.

The duration in a file is often wrong or an estimate. The sizes of its parts show reliably whether it is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

_MAX_PARTS: Final = 2_000_000
_EBML_ID: Final = 0x1A45DFA3
_SEGMENT_ID: Final = 0x18538067
_OGG_TAIL_BYTES: Final = 128 * 1024
_MP3_HEAD_BYTES: Final = 4096


class Structure(NamedTuple):
    """What the structure of a media file says about its end.

    Attributes:
        is_truncated: Whether the end of the file is missing. None if only the duration can tell.
        has_length: Whether the duration is stored in the file. Otherwise FFmpeg estimates it from the part that exists.
    """

    is_truncated: bool | None = None
    has_length: bool = True


def read_structure(file_path: Path, format_name: str) -> Structure:
    """Return the structure of a media file. `format_name` is the name in FFmpeg, such as `matroska,webm`."""
    size = file_path.stat().st_size
    with file_path.open("rb") as file:
        for name, check in _CHECKS.items():
            if name in format_name.split(","):
                return check(file, size)
    return Structure()


def has_mp4_index(file_path: Path) -> bool:
    """Return whether an MP4 file has its index (`moov`), or whether the file is in another format."""
    size = file_path.stat().st_size
    with file_path.open("rb") as file:
        kinds = _read_mp4_boxes(file, size)[0]
    return not kinds & {"ftyp", "mdat"} or "moov" in kinds


def _check_matroska(file: BinaryIO, size: int) -> Structure:
    if (header := _read_ebml_header(file, 0)) is None or header[0] != _EBML_ID or header[1] is None:
        return Structure()
    position, has_size = header[2] + header[1], True
    for _ in range(_MAX_PARTS):
        if position >= size:
            return Structure(is_truncated=position > size or (None if not has_size else False))
        if (element := _read_ebml_header(file, position)) is None:
            return Structure(is_truncated=True)  # the rest is empty
        number, length, position = element
        if length is None:
            has_size = False  # a live stream; its elements follow
        elif number != _SEGMENT_ID:
            position += length
        elif position + length > size:
            return Structure(is_truncated=True)
    return Structure()


def _read_ebml_header(file: BinaryIO, position: int) -> tuple[int, int | None, int] | None:
    """Return ID, size (None if unknown) and position of the content, or None if there is no element."""
    file.seek(position)
    head = file.read(12)
    id_length = 9 - head[0].bit_length() if head and head[0] else 9
    if id_length > 4 or len(head) <= id_length or not head[id_length]:
        return None
    size_length = 9 - head[id_length].bit_length()
    value = int.from_bytes(head[id_length : id_length + size_length], "big") & ((1 << 7 * size_length) - 1)
    is_unknown = value == (1 << 7 * size_length) - 1
    return int.from_bytes(head[:id_length], "big"), None if is_unknown else value, position + id_length + size_length


def _check_mp4(file: BinaryIO, size: int) -> Structure:
    kinds, is_cut = _read_mp4_boxes(file, size)
    return Structure(is_cut or None, has_length="moof" not in kinds)


def _read_mp4_boxes(file: BinaryIO, size: int) -> tuple[set[str], bool]:
    """Return the types of the boxes of the file, and whether the last one is cut."""
    position, kinds = 0, set[str]()
    for _ in range(_MAX_PARTS):
        file.seek(position)
        head = file.read(16)
        if len(head) < 8 or not head[4:8].isalnum():
            return kinds, False
        length = int.from_bytes(head[:4], "big")
        kinds.add(head[4:8].decode("latin-1"))
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: up to the end of the file
            return kinds, False
        position += length
        if position > size:
            return kinds, True
    return kinds, False


def _check_riff(file: BinaryIO, size: int) -> Structure:
    length = int.from_bytes(file.read(8)[4:], "little")
    is_cut = 0 < length < 0xFFFFFFFF and length + 8 > size
    return Structure(is_cut or None, has_length=not is_cut)


def _check_ogg(file: BinaryIO, size: int) -> Structure:
    """The file is cut unless its last page is complete."""
    file.seek(max(0, size - _OGG_TAIL_BYTES))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    length = 27 + page[26] if len(page) > 26 else len(page) + 1
    return Structure(length + sum(page[27:length]) > len(page) or None, has_length=False)


def _check_mp3(file: BinaryIO, size: int) -> Structure:
    """The first frame may have the number of frames."""
    head = file.read(10)
    if head[:3] == b"ID3":
        file.seek(10 + sum((byte & 0x7F) << 7 * (3 - n) for n, byte in enumerate(head[6:10])))
    frame = head + file.read(_MP3_HEAD_BYTES)
    return Structure(has_length=b"Xing" in frame or b"Info" in frame)


def _check_stream(file: BinaryIO, size: int) -> Structure:
    """The format has no header with a length."""
    return Structure(has_length=False)


_CHECKS: Final[dict[str, Callable[[BinaryIO, int], Structure]]] = {
    "matroska": _check_matroska,
    "mp4": _check_mp4,
    "avi": _check_riff,
    "wav": _check_riff,
    "ogg": _check_ogg,
    "mp3": _check_mp3,
    "aac": _check_stream,
    "mpegts": _check_stream,
    "mpeg": _check_stream,
}
