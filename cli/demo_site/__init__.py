"""A small conference website for `jobledger demo`, generated and served on this machine.

`conference` holds the content. `slides` and `video` render a talk as PDF and video. `site` writes all files to a
directory and lists the sessions to submit. `server` serves the directory on a free port.

Requires the extra `demo` (fpdf2).
"""

from jobledger.cli.demo_site.server import serve_directory
from jobledger.cli.demo_site.site import SessionFields, list_sessions, write_site

__all__ = ["SessionFields", "list_sessions", "serve_directory", "write_site"]
