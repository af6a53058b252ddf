"""Find secrets in settings, environment and files, and hide them in texts."""
