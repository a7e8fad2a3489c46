"""The one exception that a user is meant to see."""

from __future__ import annotations


class LongRopeError(Exception):
    """A mistake or a limit that the user can act on: one sentence on what was expected, what came and what to do.

    The command line prints it as one line and exits with status 1; anything else that escapes is a bug.
    """
