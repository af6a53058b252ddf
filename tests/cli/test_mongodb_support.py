"""Warnings about MongoDB releases without security fixes or with a known vulnerability."""

from __future__ import annotations

from datetime import date

import pytest

from jobledger.cli.checks.mongodb_support import build_support_warning


@pytest.mark.parametrize(
    ("version", "zlib", "expected_texts"),
    [
        ("4.2.24", False, ["no security fixes"]),
        ("4.4.29", True, ["no security fixes since 2024-02-29", "CVE-2025-14847", "4.4.30"]),
        ("5.0.32", True, ["no security fixes since 2024-10-31"]),
        ("6.0.5", False, ["no security fixes since 2025-07-31"]),
        ("7.0.27", True, ["CVE-2025-14847", "7.0.28"]),
        ("7.0.27", False, []),
        ("8.0.17-rc1", True, []),
        ("8.2.2", True, ["8.2.3"]),
        ("9.0.0", True, []),
    ],
)
def test_support_warning_for_version_names_problem(version: str, zlib: bool, expected_texts: list[str]) -> None:
    warning = build_support_warning(version, date(2026, 1, 1), zlib=zlib)
    assert (warning is not None) == bool(expected_texts)
    for expected_text in expected_texts:
        assert expected_text in (warning or "")


def test_support_warning_starts_when_support_ends() -> None:
    assert build_support_warning("7.0.30", date(2027, 8, 31), zlib=True) is None
    assert build_support_warning("7.0.30", date(2027, 9, 1), zlib=True) is not None
