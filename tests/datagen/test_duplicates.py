"""Duplicates: what the hash says of copies and of frames without structure, and that the search is exact."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.fft import dctn

from common.fingerprint import fingerprint
from common.video_writer import VideoWriter
from datagen.config import ClipConfig, DatagenConfig, FilterConfig
from datagen.duplicates import SMALL, find_duplicates, near_pairs
from datagen.plan import deciding, make_plan
from datagen.sources import Source
from datagen.survey.perceptual_hash import perceptual_hash
from datagen.survey.source_survey import SourceSurvey
from datagen.survey.video_survey import LOOK_BACK, novelty, survey
from tests.datagen.conftest import moving_picture
from tests.datagen.test_plan import CONFIG, surveyed


def flipped(values: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    """Values with exactly `bits` of 64 bits changed in each."""
    places = np.argsort(rng.random((len(values), 64)), axis=1)[:, :bits].astype(np.uint64)
    return values ^ np.bitwise_or.reduce(np.uint64(1) << places, axis=1)


def test_the_hash_is_the_sign_of_the_lowest_frequencies_against_their_median() -> None:
    thumbnail = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    transform = dctn(thumbnail.astype(float), norm="ortho")
    # of each diagonal, from the right end of the first row downwards
    diagonals = [transform[row, diagonal - row] for diagonal in range(1, 11) for row in range(diagonal + 1)]
    coefficients = np.array(diagonals[:64])
    expected = sum(1 << (63 - place) for place, value in enumerate(coefficients) if value > np.median(coefficients))
    assert perceptual_hash(thumbnail) == expected
    assert expected.bit_count() == 32


def test_frames_without_structure_have_no_hash() -> None:
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 255, 32), (32, 32))
    fine = np.indices((32, 32)).sum(0) % 2 * 255  # a checkerboard: all of it in the highest frequency
    for empty in (np.full((32, 32), 128), 128 + rng.integers(-8, 9, (32, 32)), ramp, ramp.T, fine):
        assert perceptual_hash(empty.astype(np.uint8)) is None
    assert perceptual_hash((ramp / 2 + rng.integers(0, 128, (32, 32))).astype(np.uint8)) is not None


def write(path: Path, frames: np.ndarray, crf: int) -> Path:
    height, width = frames.shape[1:3]
    with VideoWriter(path, width=width, height=height, frame_rate=Fraction(25), crf=crf) as writer:
        writer.write(frames)
    return path


def survey_of(path: Path) -> SourceSurvey:
    return survey(Source(path.name, str(path)), str(path), ClipConfig(frames=9, crop=(64, 64), respect_scenes=False))


def test_copies_are_duplicates_and_other_videos_are_not(tmp_path: Path) -> None:
    # large shapes, as photographs have them
    frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 8) for frame in moving_picture(18, 192, 256, 0)])
    frames = cv2.normalize(frames, None, 0, 230, cv2.NORM_MINMAX).astype(np.uint8)
    copies = {
        "compressed.mp4": (frames, 32),
        "half.mp4": (np.stack([cv2.resize(f, (128, 96), interpolation=cv2.INTER_AREA) for f in frames]), 28),
        "brighter.mp4": ((frames * 1.08).astype(np.uint8), 18),
        "trimmed.mp4": (frames[2:], 28),
    }
    others = {"mirrored.mp4": frames[:, :, ::-1], "turned.mp4": frames[:, ::-1]}
    surveys = [survey_of(write(tmp_path / "a.mp4", frames, 10))]
    surveys += [survey_of(write(tmp_path / name, copy, crf)) for name, (copy, crf) in copies.items()]
    surveys += [survey_of(write(tmp_path / name, other, 10)) for name, other in others.items()]
    assert all(len(found.windows) == (1 if found.source.id == "trimmed.mp4" else 2) for found in surveys)
    config = CONFIG.model_copy(update={"filters": FilterConfig(min_sharpness=0)})
    plan = make_plan(surveys, config, {})
    assert {(line["source"], line["start"], line["reason"]) for line in plan.rejected} == {
        (name, start, f"duplicate of a.mp4 at frame {start}")
        for name in copies
        for start in ((0,) if name == "trimmed.mp4" else (0, 9))
    }
    assert {sample.source for sample in plan.samples} == {"a.mp4", *others}


def test_a_loop_is_kept_once_and_a_still_too(tmp_path: Path) -> None:
    turn = moving_picture(20, 96, 128, 0)
    still = np.repeat(moving_picture(1, 96, 128, 1), 40, axis=0)
    pan = moving_picture(60, 96, 128, 2)
    config = CONFIG.model_copy(update={"filters": FilterConfig(min_motion=0, min_sharpness=0, duplicate_distance=0)})
    for name, frames, kept in (
        (
            "loop.mp4",
            np.concatenate([turn] * 3),
            [0, 9, 18],
        ),  # 18...26: no earlier stretch goes from the end to the start
        ("still.mp4", still, [0]),
        ("pan.mp4", pan, [0, 9, 18, 27, 36, 45]),
    ):
        found = survey_of(write(tmp_path / name, frames, 12))
        plan = make_plan([found], config, {})
        repeated = {line["start"] for line in plan.rejected if line["reason"].startswith("repeated: novelty 0.")}
        starts = sorted(sample.start for sample in plan.samples)
        assert len(plan.rejected) == len(repeated) and len(starts) + len(repeated) == len(found.windows), name
        assert starts == kept, (name, [(window.start, window.novelty) for window in found.windows])


def test_novelty_is_the_difference_from_the_most_similar_earlier_stretch() -> None:
    levels = np.array([0, 50, 100, 150, 200, 3, 53, 103, 153, 203], np.uint8)
    frames = np.broadcast_to(levels[:, None, None], (10, 4, 4))
    assert novelty(frames, 5, 5) == 3.0
    assert novelty(frames, 6, 3) == 3.0  # not 50, the difference from frame to frame
    assert novelty(frames, 4, 5) == 255.0  # nothing of that length came before
    long = np.concatenate([frames[:5], np.full((LOOK_BACK - 5, 4, 4), 255, np.uint8), frames[:5]])
    assert novelty(long, LOOK_BACK, 5) == 0.0
    longer = np.concatenate([frames[:5], np.full((LOOK_BACK - 4, 4, 4), 255, np.uint8), frames[:5]])
    assert novelty(longer, LOOK_BACK + 1, 5) > 50.0


def test_windows_without_structure_are_no_duplicates() -> None:
    shown = "0123456789abcdef"
    for hashes, duplicates in (
        ((None, None, None), 0),
        ((shown, None, shown), 0),
        ((None, shown, None), 1),
        ((None, shown, shown), 1),
    ):
        plan = make_plan([surveyed("a", hashes=hashes), surveyed("b", hashes=hashes)], CONFIG, {})
        assert len(plan.rejected) == duplicates, hashes
    # one fades in and the other does not
    pair = [surveyed("a", hashes=(None, shown, shown)), surveyed("b", hashes=(shown, shown, shown))]
    assert make_plan(pair, CONFIG, {}).rejected == []


@pytest.mark.parametrize("distance", [1, 2, 5, 13, 16])
def test_fewer_bits_than_the_distance_make_a_duplicate(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, (4, 3), dtype=np.uint64)
    hashes[1] = flipped(hashes[0], distance - 1, rng)
    hashes[2] = flipped(hashes[0], distance - 1, rng)
    hashes[2, 2] = flipped(hashes[:1, 2], distance, rng)[0]  # one frame is too far away
    found = find_duplicates(hashes, np.ones((4, 3), bool), np.arange(4), distance)
    assert found.tolist() == [-1, 0, -1, -1]


def literal(hashes: np.ndarray, structured: np.ndarray, sources: np.ndarray, distance: int) -> list[int]:
    """The definition, window by window."""
    found = [-1] * len(hashes)
    for later in range(len(hashes)):
        for earlier in range(later):
            usable = structured[later, 1] and structured[earlier, 1] and found[earlier] < 0
            if usable and sources[later] != sources[earlier] and found[later] < 0:
                near = [
                    structured[later, frame] == structured[earlier, frame]
                    and (
                        not structured[later, frame]
                        or (int(hashes[later, frame]) ^ int(hashes[earlier, frame])).bit_count() < distance
                    )
                    for frame in range(3)
                ]
                found[later] = earlier if all(near) else -1
    return found


def test_the_first_of_a_crowd_is_kept_as_by_the_definition() -> None:
    rng = np.random.default_rng(0)
    for windows_per_source in (1, 3):
        centers = rng.integers(0, 2**64, (12, 3), dtype=np.uint64)
        hashes = centers[rng.integers(0, 12, 300)]
        for column in range(3):  # up to ten bits from the center: some pairs are near, some are not, some are equal
            for row in range(0, 300, 2):
                hashes[row : row + 1, column] = flipped(hashes[row : row + 1, column], int(rng.integers(0, 11)), rng)
        structured = rng.random((300, 3)) > 0.1
        sources = np.arange(300) // windows_per_source
        expected = literal(hashes, structured, sources, 13)
        assert 50 < sum(index >= 0 for index in expected) < 250
        assert find_duplicates(hashes, structured, sources, 13).tolist() == expected


@pytest.mark.parametrize(("radius", "crowd"), [(12, False), (5, True)])
def test_the_tables_find_what_comparing_all_pairs_finds(radius: int, crowd: bool) -> None:
    rng = np.random.default_rng(1)
    count = SMALL + 1000
    values = rng.integers(0, 2**64, count, dtype=np.uint64)
    if crowd:  # every third bit is 0 in nearly all, which is one of the bands
        values[500:] &= np.uint64(0x6DB6DB6DB6DB6DB6)
    for bits in range(radius - 3, radius + 4):
        first = rng.integers(0, count, 100)
        values[rng.integers(0, count, 100)] = flipped(values[first], bits, rng)
    signs = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).astype(np.float32) * 2 - 1
    expected: set[tuple[int, int]] = set()
    for start in range(0, count, 512):
        rows, columns = np.nonzero(signs[start : start + 512] @ signs.T >= 64 - 2 * radius)
        rows, columns = rows[rows + start < columns] + start, columns[rows + start < columns]
        expected |= set(zip(rows.tolist(), columns.tolist(), strict=True))
    found = {
        (min(pair), max(pair))
        for left, right in near_pairs(values, radius)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    }
    assert len(expected) > 300
    assert found == expected


def test_the_hash_of_the_plan_is_that_of_its_content() -> None:
    surveys = [surveyed(f"é {index}") for index in range(3)]
    config = DatagenConfig(clip=CONFIG.clip, variants=2)
    plan = make_plan(surveys, config, {"vae": "of tests"})
    samples = [{name: value for name, value in asdict(sample).items() if name != "path"} for sample in plan.samples]
    assert len(samples) == 6
    assert plan.hash == fingerprint({"samples": samples, "config": deciding(config), "versions": {"vae": "of tests"}})
