"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Something that the user can put right: the message says where, what is allowed and what to do next.

    Commands print its message without a traceback and exit with status 2.
    """
