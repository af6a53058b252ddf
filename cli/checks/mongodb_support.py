"""Support status and known vulnerabilities of MongoDB releases."""

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
# First fixed patch releases for CVE-2025-14847: zlib decompression discloses server memory before authentication.
_ZLIB_FIXED: Final = {(4, 4): 30, (5, 0): 32, (6, 0): 27, (7, 0): 28, (8, 0): 17, (8, 2): 3}


def build_support_warning(version: str, today: date, *, zlib: bool) -> str | None:
    """Return a warning about this version of MongoDB, or None.

    Args:
        version: Version that the server reports, such as "6.0.5".
        today: Date to compare with the end of support.
        zlib: Whether the server accepts messages compressed with zlib.
    """
    major, minor, patch = (int(part) for part in version.partition("-")[0].split(".")[:3])
    series, warnings = (major, minor), []
    if (end := _END_OF_SUPPORT.get(series)) is not None and today > end:
        warnings.append(f"MongoDB {major}.{minor} has had no security fixes since {end}: upgrade to 8.0")
    elif end is None and series < (7, 0):
        warnings.append(f"MongoDB {major}.{minor} has no security fixes: upgrade to 8.0")
    if zlib and patch < _ZLIB_FIXED.get(series, 0):
        warnings.append(
            f"every client that can connect can read the server's memory (CVE-2025-14847): upgrade to {major}.{minor}."
            f"{_ZLIB_FIXED[series]}, or start it with --networkMessageCompressors snappy,zstd"
        )
    return "; ".join(warnings) or None
