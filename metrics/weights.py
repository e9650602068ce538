"""Where weight files are looked for, and what is said when one is not there.

Nothing is downloaded while scoring: a metric names the file it needs and where it is published, and the
reader decides. Files are opened with `weights_only=True`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError

#: environment variable that names a folder with weight files
VARIABLE = "DUO_VSR_WEIGHTS"


def search_folders(first: Path | None = None) -> list[Path]:
    """Folders searched for weights, in order: the one given, $DUO_VSR_WEIGHTS, ours, torch hub's."""
    folders = [first] if first else []
    if os.environ.get(VARIABLE):
        folders.append(Path(os.environ[VARIABLE]))
    folders.append(Path.home() / ".cache" / "duo-vsr" / "weights")
    folders.append(Path(torch.hub.get_dir()) / "checkpoints")
    return folders


def find_weights(metric: str, file_name: str, source: str, folder: Path | None = None) -> Path:
    """Path of `file_name`.

    Args:
        metric: name of the metric that needs it, for the message.
        source: where people get the file, for the message.

    Raises:
        UserError: naming the file, its source and where to put it.
    """
    folders = search_folders(folder)
    for candidate in folders:
        if (candidate / file_name).is_file():
            return candidate / file_name
    target = folders[0] if len(folders) > 2 else folders[-2]
    raise UserError(
        f"{metric} needs {file_name}: get it from {source} and put it in {target} "
        f"(or name its folder with --weights or ${VARIABLE})"
    )


def load_state_dict(path: Path) -> dict[str, Any]:
    """A PyTorch state dict, without running code from the file.

    Raises:
        UserError: the file is damaged or holds more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is not a readable PyTorch weight file ({type(error).__name__}); get it again"
        ) from None
    return state


def missing_package(metric: str, package: str, cause: ImportError, file_name: str, source: str) -> UserError:
    """The error for an optional package that does not import; it names the weight file too."""
    return UserError(
        f"{metric} needs the package {package} ({cause}; pip install {package}) and {file_name} from {source}"
    )
