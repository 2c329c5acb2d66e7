"""Errors that are reported without a traceback."""


class UserError(ValueError):
    """Invalid input: config, data, reward or output folder. The message says where, what is allowed and what to do.

    Commands print the message without a traceback and exit with status 2.
    """


class ProcessGone(Exception):
    """A process that the run needs has died. The message names the process and says what to do."""
