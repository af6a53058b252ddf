"""Convert a presentation to PDF with LibreOfficeKit. `presentation_conversion` runs this script in the sandbox.

Unlike the program `soffice`, the library needs no sockets. The script imports only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Final

LIBRARIES: Final = ("libsofficeapp.so", "libmergedlo.so")
_DOCUMENT_LOAD, _SAVE_AS = 2, 2
"""Indexes in the function tables of LibreOfficeKit.h, after the size and `destroy`."""


def main() -> None:
    """Convert a file. Arguments: program directory, profile URL, source URL, URLs of a PDF and perhaps a `.fodp`."""
    programs, profile, source, *targets = (argument.encode() for argument in sys.argv[1:])
    path = next(file for name in LIBRARIES if (file := Path(programs.decode(), name)).exists())
    hook = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL).libreofficekit_hook_2
    hook.restype, hook.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p]
    office = hook(programs, profile)
    load = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(_get_function(office, _DOCUMENT_LOAD))
    document = load(office, source) if office else None
    is_saved = False
    if document:
        texts = [ctypes.c_char_p] * 3
        save = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *texts)(_get_function(document, _SAVE_AS))
        is_saved = all(save(document, target, target.rpartition(b".")[2], None) for target in targets)
    os._exit(0 if is_saved else 1)  # skips LibreOffice's own cleanup, which may hang


def _get_function(structure: int, index: int) -> int:
    """Return a function of a C structure that starts with a pointer to its function table."""
    table = ctypes.cast(structure, ctypes.POINTER(ctypes.c_void_p))[0]
    function = ctypes.cast(table or 0, ctypes.POINTER(ctypes.c_void_p))[index]
    return function or 0


if __name__ == "__main__":
    main()
