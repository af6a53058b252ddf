"""The program `jobledger`. It imports the commands in a way that Ctrl-C can interrupt without a traceback."""

from __future__ import annotations

import signal


def main() -> None:
    """Import the commands, and run the one that the arguments name.

    Until a command runs, and after it, an interrupt ends the process as by default in other programs.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_handled = handler is signal.default_int_handler  # it is not if the parent process ignores interrupts
    if is_handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from jobledger.cli.main import main as run_main

    if is_handled:
        signal.signal(signal.SIGINT, handler)
    try:
        run_main()
    finally:
        if is_handled:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
