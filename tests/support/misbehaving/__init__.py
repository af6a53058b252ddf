"""Job types that misbehave on request: `misbehaving` in a job process and `misbehaving-inline` inline.

Both run the same functions. The parameter `{"action": "exit at once"}` runs the function `exit_at_once`.
"""

from __future__ import annotations

from tests.support.misbehaving import endings, files, job_process, values  # noqa: F401 - they register actions
from tests.support.misbehaving.processor import InlineMisbehavingProcessor, MisbehavingProcessor
from tests.support.misbehaving.values import ACCEPTED_VALUES, REJECTED_VALUES, STEP_NAMES, WARNINGS

__all__ = [
    "ACCEPTED_VALUES",
    "REJECTED_VALUES",
    "STEP_NAMES",
    "WARNINGS",
    "InlineMisbehavingProcessor",
    "MisbehavingProcessor",
]
