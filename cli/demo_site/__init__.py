"""A small conference website for `jobledger demo`, generated and served on this machine.

`conference` holds the content. `slides` and `video` render a talk as PDF and video. `site` writes all files to a
directory, serves it on a free port, and lists the session jobs to submit.

Requires the extra `demo` (fpdf2).
"""

from jobledger.cli.demo_site.site import list_sessions, serve_directory, write_site

__all__ = ["list_sessions", "serve_directory", "write_site"]
