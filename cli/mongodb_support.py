"""cli: which MongoDB releases get security fixes, and which have a known hole that we can see."""

from __future__ import annotations

from datetime import date
from typing import Final

# https://www.mongodb.com/legal/support-policy/lifecycles
_END_OF_SUPPORT: Final = {
    (4, 4): date(2024, 2, 29),
    (5, 0): date(2024, 10, 31),
    (6, 0): date(2025, 7, 31),
    (7, 0): date(2027, 8, 31),
    (8, 0): date(2029, 10, 31),
}
# CVE-2025-14847: zlib decompression, before sign-in, answers with memory of the server.
_ZLIB_FIXED: Final = {(4, 4): 30, (5, 0): 32, (6, 0): 27, (7, 0): 28, (8, 0): 17, (8, 2): 3}


def support_warning(version: str, today: date, *, zlib: bool) -> str | None:
    """Return what is wrong with running this version of MongoDB, or None.

    Args:
        version: As the server reports it, such as "6.0.5".
        today: For the end of support.
        zlib: Whether the server accepts messages compressed with zlib.
    """
    major, minor, patch = (int(part) for part in version.partition("-")[0].split(".")[:3])
    series, warnings = (major, minor), []
    if (end := _END_OF_SUPPORT.get(series)) is not None and today > end:
        warnings.append(f"MongoDB {major}.{minor} gets no security fixes since {end}: upgrade to 8.0")
    elif end is None and series < (7, 0):
        warnings.append(f"MongoDB {major}.{minor} gets no security fixes: upgrade to 8.0")
    if zlib and patch < _ZLIB_FIXED.get(series, 0):
        warnings.append(
            f"whoever reaches the server can read its memory (CVE-2025-14847): upgrade to {major}.{minor}."
            f"{_ZLIB_FIXED[series]}, or start it with --networkMessageCompressors snappy,zstd"
        )
    return "; ".join(warnings) or None
