"""Errors meant for people: one line that names the thing, the value and the remedy."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. Its message is shown alone, without a traceback."""


class StorageError(UserError):
    """Files are out of reach, whatever they hold: a disk that is gone or full, a server that does not answer."""


#: what a disk answers, and the remedy
DISK_FAULTS = {
    errno.ENOSPC: "free space and run the same command again",
    errno.EDQUOT: "free space, or have your quota raised, and run the same command again",
    errno.EROFS: "choose a folder that can be written to",
}


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` or a full disk becomes one line on stderr and exit status 2."""
    try:
        main()
    except (UserError, OSError) as error:
        message = for_people(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def for_people(error: BaseException) -> str | None:
    """The line that says what is to be done, None if `error` is a defect and its traceback the better answer."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {DISK_FAULTS[error.errno]}"
    return None
