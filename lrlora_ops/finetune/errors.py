"""What a user of the command line is told in one line, and the exit code that goes with it."""

import errno


class CommandError(Exception):
    """Bad input or a run that cannot go on; the message is one line and says what to do."""

    code = 2


class CheckFailed(Exception):
    """A run came to its end, but what must hold of any run does not; the message is one line and says what to do."""

    code = 1


class DiskFull(CommandError):
    """There is no room for what has to be written."""

    code = 3


class Diverged(CommandError):
    """The loss or its gradient is not finite any more."""

    code = 4


class OutOfMemory(CommandError):
    """The GPU has no memory left."""

    code = 5


class Stopped(CommandError):
    """The user stopped it."""

    code = 130


def disk_is_full(error: BaseException) -> bool:
    """Whether there is no room, or no more of it is allowed."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
