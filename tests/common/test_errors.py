"""What a command says when it ends by an error."""

from __future__ import annotations

import errno

import pytest

from common.errors import UserError, run_command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("steps = 0; give 1 or more"), "error: steps = 0; give 1 or more"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/log"),
            "error: /data/log: No space left on device; free space and run the same command again",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: No space left on device; free space and run the same command again",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == line + "\n"


def test_a_defect_keeps_its_traceback() -> None:
    def main() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/log")

    with pytest.raises(FileNotFoundError):
        run_command(main)
