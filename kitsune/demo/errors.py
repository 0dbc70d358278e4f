"""The one error that the demo shows to its user."""


class DemoError(Exception):
    """A sentence for the user: the demo cannot run as asked. The command line prints it and exits with 2."""
