"""session: make a PDF of a presentation by LibreOffice's own library. `office.py` runs this in the sandbox.

The library (LibreOfficeKit) needs no sockets, which the program `soffice` does. It imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Final

LIBRARIES: Final = ("libsofficeapp.so", "libmergedlo.so")
_DOCUMENT_LOAD, _SAVE_AS = 2, 2
"""Places in the tables of functions, LibreOfficeKit.h: after the size and `destroy`."""


def main() -> None:
    """Convert: directory of the programs, profile (URL), source (URL), target (URL)."""
    programs, profile, source, target = (argument.encode() for argument in sys.argv[1:])
    path = next(found for name in LIBRARIES if (found := Path(programs.decode(), name)).exists())
    hook = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL).libreofficekit_hook_2
    hook.restype, hook.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p]
    office = hook(programs, profile)
    load = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(_function(office, _DOCUMENT_LOAD))
    document = load(office, source) if office else None
    done = False
    if document:
        texts = [ctypes.c_char_p] * 3
        save = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *texts)(_function(document, _SAVE_AS))
        done = bool(save(document, target, b"pdf", None))
    os._exit(0 if done else 1)  # what is left to tidy up ends with the process, and may hang


def _function(structure: int, place: int) -> int:
    """Return a function of a C structure that begins with a pointer to its table of functions."""
    table = ctypes.cast(structure, ctypes.POINTER(ctypes.c_void_p))[0]
    found = ctypes.cast(table or 0, ctypes.POINTER(ctypes.c_void_p))[place]
    return found or 0


if __name__ == "__main__":
    main()
