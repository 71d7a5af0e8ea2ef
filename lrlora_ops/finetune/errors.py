"""What a user of the command line is told in one line."""


class CommandError(Exception):
    """Bad input or a run that cannot go on; the message is one line and says what to do."""


class CheckFailed(Exception):
    """A run came to its end, but what must hold of any run does not; the message is one line and says what to do."""
