"""What ends a run with one plain message."""


class UserError(ValueError):
    """Something that the user can put right: the message says where, what is allowed and what to do next.

    Commands print its message without a traceback and exit with status 2.
    """


class ProcessGone(Exception):
    """A process that the run needs has died; the message says which, and what to do."""
