"""Where weight files are looked for, and what is said when one is not there.

Nothing is downloaded while scoring: a metric names the file it needs and where it is published, and the
reader decides. Files are opened with `weights_only=True`.
"""

from __future__ import annotations

import importlib
import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from common.errors import UserError
from metrics.frame_metric import Metric, MetricSettings

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


class WeightedMetric(Metric):
    """A metric with a network of an optional package and a weight file that nothing downloads."""

    needs_weights = True
    #: what `pip install` takes, and the module that is imported
    package: ClassVar[str]
    module: ClassVar[str]
    #: name of the weight file, and where people get it
    file: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings)
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise UserError(
                f"{self.name} needs the package {self.package} ({error}; pip install {self.package}) and "
                f"{self.file} from {self.source}"
            ) from None
        self.files = [find_weights(self.name, self.file, self.source, self.settings.weights)]
        self.load(module, self.files[0])

    @abstractmethod
    def load(self, module: Any, path: Path) -> None:
        """Make the network from the imported module and its weight file."""

    def ready(self, network: Any) -> Any:
        """`network` without gradients, on the device."""
        return network.requires_grad_(False).eval().to(self.settings.device)
