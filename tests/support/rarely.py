"""tests: those that take long for what they find in one run; `make soak` runs them, again and again."""

from __future__ import annotations

import os
from typing import Final

import pytest

SOAK: Final = bool(os.environ.get("JOBLEDGER_SOAK"))
rarely: Final = pytest.mark.skipif(not SOAK, reason="takes long for what it finds: make soak")
