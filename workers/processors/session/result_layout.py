"""session: where results are stored. Pure: names from outside become path parts that are safe on every file system."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from hashlib import sha256

MAX_CHARACTERS = 80
MAX_BYTES = 200

# White space, separators, what Windows reserves, control and format characters (some turn the reading direction, which
# disguises names), lone surrogates; a run of them with the dashes around it becomes one dash. Joiners stay.
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
    """The paths of one job's results: the same on every attempt, and no other job's."""

    folder: str
    markdown_path: str

    def asset_path(self, name: str) -> str:
        return f"{self.folder}/assets/{name}"


def build_layout(*, event: str, track: str, session: str, filename: str, job_id: str) -> ResultLayout:
    """`{event}/{track}/{session}-{mark of the job}/{filename}`.

    The mark keeps apart what is named alike: two sample sessions share event, track and file name.
    """
    mark = sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()[-8:]
    own = f"{_shortened(_safe(session), MAX_CHARACTERS - 9, MAX_BYTES - 9)}-{mark}"
    folder = "/".join((sanitize_path_component(event), sanitize_path_component(track), own))
    name = sanitize_path_component(filename)
    if name.casefold() == "assets" or name == "link":
        name = f"{name}.md"  # a file beside the folder `assets` cannot have its name; `link` is reserved by the API
    return ResultLayout(folder=folder, markdown_path=f"{folder}/{name}")


def sanitize_path_component(name: str) -> str:
    """One part of a path, as close to `name` as is safe: at most 80 characters and 200 bytes of UTF-8.

    Too long names end in a digest of the whole, so those that differ only at their end stay different.
    """
    return _shortened(_safe(name), MAX_CHARACTERS, MAX_BYTES)


def _safe(name: str) -> str:
    text = _UNSAFE.sub("-", _EDGES.sub("", unicodedata.normalize("NFC", name)))
    if not text:
        return "untitled"
    return f"_{text}" if _DEVICE.match(text) else text


def _shortened(name: str, characters: int, size: int) -> str:
    if len(name) <= characters and len(name.encode()) <= size:
        return name
    found = _EXTENSION.search(name)
    extension = found.group() if found else ""
    ending = f"-{sha256(name.encode()).hexdigest()[:8]}{extension}"
    stem = name[: characters - len(ending)].encode()[: size - len(ending)].decode(errors="ignore")
    return stem.rstrip("-.") + ending
