"""Exit codes of the command `jobledger`.

Only `EXIT_USAGE` needs a change of arguments or settings. After the others, starting again may help.
"""

from __future__ import annotations

from typing import Final

EXIT_FAILED: Final = 1
"""The operation or a job failed, or a check found a problem."""
EXIT_USAGE: Final = 2
"""Arguments or settings are wrong."""
EXIT_UNREACHABLE: Final = 3
"""A service, such as the database or the API, does not respond."""
EXIT_UNAVAILABLE: Final = 4
"""A time limit has passed, or a port, disk, lock or limit of this machine is temporarily unavailable."""
EXIT_INTERRUPTED: Final = 130
"""Ctrl-C, as in shells: 128 and the number of the signal."""
EXIT_CLOSED_PIPE: Final = 141
"""The reader of the output has closed it, as in `jobledger jobs ls | head -1`. As if SIGPIPE had ended the process."""
