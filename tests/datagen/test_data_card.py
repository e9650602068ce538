"""What the data card says of what was left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.lossless_clip import write_lossless
from common.storage import StorageConfig
from datagen.config import DatagenConfig
from datagen.dataset.data_card import left_out
from datagen.example_frames import example_frames
from datagen.sources import Source
from datagen.survey.decoder_process import survey_isolated
from tests.datagen.conftest import moving_picture

CONFIG = DatagenConfig.model_validate({"clip": {"frames": 9, "crop": [64, 64]}})


def test_a_frame_is_shown_of_what_is_left_out(tmp_path: Path) -> None:
    pictures, storage = moving_picture(27, 80, 96, 0), StorageConfig(attempts=1)
    for name in ("a.mkv", "gone.mkv"):
        write_lossless(tmp_path / name, pictures)
    sources = [Source(name, str(tmp_path / name)) for name in ("a.mkv", "gone.mkv")]
    surveys = [survey_isolated(source, CONFIG, storage) for source in sources]
    (tmp_path / "gone.mkv").unlink()
    lines = [{"source": "text.mp4"}, {"source": "a.mkv", "start": 9}, {"source": "a.mkv"}, {"source": "gone.mkv"}]
    nothing, middle, first, gone = example_frames(lines, surveys, CONFIG, storage)
    assert nothing is None and gone is None
    assert np.array_equal(middle, pictures[13]) and np.array_equal(first, pictures[0])


def test_reasons_are_counted_without_their_particulars() -> None:
    told = ["black: luma 3.1 is below 8.0", "black: luma 2 is below 8.0", "copy of held-out a: frame 0 is like frame 9"]
    told += ["duplicate of a at frame 9", "length 8 frames is below the window of 9", "duplicate of b at frame 0"]
    told += ["black: luma 1 is below 8.0"]
    lines = [{"kind": "filtered", "reason": reason} for reason in told]
    lines += [{"kind": "unreadable", "reason": "resolution.mp4: not a video"}]
    counted = {"black": 3, "duplicate": 2, "copy of a held-out source": 1, "too short": 1, "unreadable": 1}
    assert left_out(lines) == counted and list(left_out(lines))[:2] == ["black", "duplicate"]


def test_the_order_of_counting_does_not_show() -> None:
    one, other = (
        [{"kind": "unreadable" if reason else "filtered", "reason": "black: 1"} for reason in reasons]
        for reasons in ((0, 1), (1, 0))
    )
    assert list(left_out(one).items()) == list(left_out(other).items())
