"""cli: a small conference web site for `jobledger demo`, made by our own hands and served on this machine only.

`talks` is what the conference says, `deck` and `video` turn it into PDF and film, `site` writes it all to a directory
and names the sessions to submit, `serving` puts the directory on a free port. Needs the extra `demo` (fpdf2).
"""

from jobledger.cli.demo_site.serving import serve
from jobledger.cli.demo_site.site import Session, make_site, sessions

__all__ = ["Session", "make_site", "serve", "sessions"]
