"""What a user of the command line can put right."""


class CommandError(Exception):
    """Bad input or a run that cannot go on; the message is one line and says what to do."""
