"""What the data card says of what was left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.lossless_clip import write_lossless
from common.storage import StorageConfig
from datagen.config import DatagenConfig
from datagen.dataset.data_card import left_out
from datagen.example_frames import example_frames
from datagen.plan import make_plan
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
    sample = make_plan(surveys[:1], CONFIG, {}).samples[0]
    top, left, height, width = sample.crop
    lines = [{"source": "text.mp4"}, {"source": "a.mkv", "start": 9}, {"source": "a.mkv"}, {"source": "gone.mkv"}]
    lines[:0] = [{"source": "a.mkv", "start": sample.start, "key": sample.key}]
    crop, nothing, middle, first, gone = example_frames(lines, surveys, [sample], CONFIG, storage)
    assert nothing is None and gone is None
    assert np.array_equal(middle, pictures[13]) and np.array_equal(first, pictures[0])
    assert np.array_equal(crop, pictures[sample.start + 4, top : top + height, left : left + width])
    assert crop.shape == (64, 64, 3)


def test_reasons_are_counted_without_their_particulars() -> None:
    told = ["black: luma 3.1 is below 8.0", "black: luma 2 is below 8.0", "copy of held-out a: frame 0 is like frame 9"]
    told += ["duplicate of a at frame 9", "length 8 frames is below the window of 9", "duplicate of b at frame 0"]
    told += ["black: luma 1 is below 8.0"]
    lines = [{"kind": "filtered", "reason": reason} for reason in told]
    lines += [{"kind": "unreadable", "reason": "resolution.mp4: not a video"}]
    sources = {"black": 3, "duplicate": 2, "copy of a held-out source": 1, "too short": 1, "unreadable": 1}
    assert left_out(lines) == {"sources": sources}
    assert list(left_out(lines)["sources"])[:2] == ["black", "duplicate"]
    lines += [{"kind": "filtered", "start": 9, "reason": "empty: contrast 3.0 is below 4.0"}]
    lines += [{"kind": "filtered", "start": 9, "key": "a-0", "reason": "empty crop: contrast 0.0 is below 4.0"}]
    lines += [{"kind": "failed", "start": 9, "key": "a-1", "reason": "VAE: OutOfMemoryError"}]
    counted = {"sources": sources, "windows": {"empty": 1}, "samples": {"empty crop": 1, "failed": 1}}
    assert left_out(lines) == counted


def test_the_order_of_counting_does_not_show() -> None:
    one, other = (
        [{"kind": "unreadable" if reason else "filtered", "reason": "black: 1"} for reason in reasons]
        for reasons in ((0, 1), (1, 0))
    )
    assert list(left_out(one)["sources"].items()) == list(left_out(other)["sources"].items())
