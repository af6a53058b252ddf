"""Build result paths. Names from the client become path components that are safe on all file systems. Pure."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from hashlib import sha256

MAX_CHARACTERS = 80
MAX_BYTES = 200

# White space, separators, characters reserved by Windows, control and format characters (some change the writing
# direction and disguise names), lone surrogates. A run of them with adjacent dashes becomes one dash. Joiners stay.
_BAD = r'\s/\\<>:"|?*\x00-\x1f\x7f-\x9f\ud800-\udfff'
_BAD += r"\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u180e\u200b\u200e-\u200f\u202a-\u202e\u2060-\u2064"
_BAD += r"\u2066-\u206f\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U00013438\U0001bca0-\U0001bca3"
_BAD += r"\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f"
_EDGES = re.compile(f"^[{_BAD}.]+|[{_BAD}.]+$")
_UNSAFE = re.compile(f"-*(?:[{_BAD}]|%(?=[0-9A-Fa-f]{{2}}))[{_BAD}-]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(?=\.|$)", re.IGNORECASE)
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,10}$")


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """The result paths of one job. They are the same for every attempt and unique to the job."""

    folder: str
    markdown_path: str

    def build_asset_path(self, name: str) -> str:
        return f"{self.folder}/assets/{name}"


def build_layout(*, event: str, track: str, session: str, filename: str, job_id: str) -> ResultLayout:
    """Return the paths `{event}/{track}/{session}-{job digest}/{filename}`.

    The digest separates sessions with the same event, track and file name.
    """
    job_digest = sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()[-8:]
    session_folder = f"{_truncate(_replace_unsafe(session), MAX_CHARACTERS - 9, MAX_BYTES - 9)}-{job_digest}"
    folder = "/".join((sanitize_path_component(event), sanitize_path_component(track), session_folder))
    name = sanitize_path_component(filename)
    if name.casefold() == "assets" or name == "link":
        name = f"{name}.md"  # `assets` is a folder in the same place; the API reserves `link`
    return ResultLayout(folder=folder, markdown_path=f"{folder}/{name}")


def sanitize_path_component(name: str) -> str:
    """Return a safe path component similar to `name`, with at most 80 characters and 200 bytes of UTF-8.

    A longer name is cut and gets a digest of the whole name, so that names with the same beginning stay different.
    """
    return _truncate(_replace_unsafe(name), MAX_CHARACTERS, MAX_BYTES)


def _replace_unsafe(name: str) -> str:
    text = _UNSAFE.sub("-", _EDGES.sub("", unicodedata.normalize("NFC", name)))
    if not text:
        return "untitled"
    return f"_{text}" if _DEVICE.match(text) else text


def _truncate(name: str, max_characters: int, max_bytes: int) -> str:
    if len(name) <= max_characters and len(name.encode()) <= max_bytes:
        return name
    match = _EXTENSION.search(name)
    extension = match.group() if match else ""
    ending = f"-{sha256(name.encode()).hexdigest()[:8]}{extension}"
    stem = name[: max_characters - len(ending)].encode()[: max_bytes - len(ending)].decode(errors="ignore")
    return stem.rstrip("-.") + ending
