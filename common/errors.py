"""Errors meant for people: one line that names the thing, the value and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. Its message is shown alone, without a traceback."""


class StorageError(UserError):
    """Files are out of reach, whatever they hold: a disk that is gone or full, a server that does not answer."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
