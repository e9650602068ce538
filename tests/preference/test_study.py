"""The blind study: nothing in the page tells the sides, the seed fixes them, the score is the written
formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import UserError
from preference.study.study import Tally, make_study, tally

CLIPS = [f"clip{number}.mp4" for number in range(40)]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for method in ("ours", "other"):
        (tmp_path / method).mkdir()
        for name in CLIPS:
            (tmp_path / method / name).write_bytes(f"{method} {name}".encode())
    return tmp_path


def test_sides_follow_the_seed_and_only_the_key_knows_them(folders: Path) -> None:
    keys = [
        make_study(folders / "ours", folders / "other", folders / name, seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert keys[0] == keys[1] != keys[2]
    sides = [pair["ours"] for pair in keys[0]["pairs"]]
    assert 8 < sides.count("left") < 32  # of 40 fair coins: fails once in 80 000 seeds
    assert sorted(pair["name"] for pair in keys[0]["pairs"]) == sorted(CLIPS)
    assert [pair["name"] for pair in keys[0]["pairs"]] != CLIPS
    page = folders / "a" / "page"
    assert "ours" not in (page / "index.html").read_text()
    assert sorted(path.name for path in page.iterdir()) == ["clips", "index.html"]
    for index, pair in enumerate(keys[0]["pairs"]):
        for side in ("left", "right"):
            method = "ours" if pair["ours"] == side else "other"
            content = (page / "clips" / f"{index:03d}-{side}.mp4").read_text()
            assert content == f"{method} {pair['name']}"


def test_score_counts_from_our_side() -> None:
    sides = ["left", "right", "left", "right", "left"]
    key = {"study": "s", "pairs": [{"name": str(i), "ours": side} for i, side in enumerate(sides)]}
    sheet = {"study": "s", "rater": "x", "answers": {"0": "left", "1": "left", "2": "same", "3": "right", "4": "left"}}
    counted = tally(key, [sheet])
    assert counted == Tally(good=3, same=1, bad=1)
    assert counted.score == pytest.approx((3 - 1) / 5)
    assert tally(key, [sheet, sheet]) == Tally(6, 2, 2)
    assert Tally(0, 0, 0).score == 0


def test_sign_test_ignores_ties() -> None:
    assert Tally(good=9, same=50, bad=1).p_value == pytest.approx(22 / 1024)  # 2·(1 + 10)/2¹⁰
    assert Tally(good=0, same=5, bad=0).p_value == 1


def test_what_cannot_be_a_study_is_said(folders: Path) -> None:
    key = make_study(folders / "ours", folders / "other", folders / "study")
    assert json.loads((folders / "study/key.json").read_text()) == key
    with pytest.raises(UserError, match="holds a study already"):
        make_study(folders / "ours", folders / "other", folders / "study")
    with pytest.raises(UserError, match="another study"):
        tally(key, [{"study": "else", "rater": "x", "answers": {}}])
    with pytest.raises(UserError, match="none of left, same, right"):
        tally(key, [{"study": key["study"], "answers": {"0": "better"}}])
    (folders / "ours/extra.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"extra\.mp4 is in one of"):
        make_study(folders / "ours", folders / "other", folders / "again")
    (folders / "empty").mkdir()
    with pytest.raises(UserError, match="browsers play"):
        make_study(folders / "empty", folders / "empty", folders / "none")
