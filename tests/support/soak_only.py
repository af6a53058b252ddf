"""Mark slow tests that only `make soak` runs."""

from __future__ import annotations

import os
from typing import Final

import pytest

IS_SOAK_RUN: Final = bool(os.environ.get("JOBLEDGER_SOAK"))
soak_only: Final = pytest.mark.skipif(not IS_SOAK_RUN, reason="a long search for rare faults: make soak")
