"""cli: a small conference web site for `jobledger demo`, made by our own hands and served on this machine only.

`talks` is what the conference says, `deck` and `video` turn it into PDF and film, `site` writes it all to a directory
and names the sessions to submit, `serving` puts the directory on a free port. Needs the extra `demo` (fpdf2).
"""

from jobledger.cli.demo_site.server import serve_directory
from jobledger.cli.demo_site.site import SessionFields, list_sessions, write_site

__all__ = ["SessionFields", "list_sessions", "serve_directory", "write_site"]
