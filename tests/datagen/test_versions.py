"""The plan's hash notices code that decides bytes, and nothing else about it."""

from __future__ import annotations

import pytest

from datagen.versions import DEGRADATION_CODE, ENCODING_CODE, SURVEY_CODE, code_hash, modules_hash

CODE = '''
"""What it is for."""

class Noise:
    """A noise."""

    def draw(self, scale: float) -> float:
        """One value."""
        # why
        return scale * 2
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("        # why\n", "", True),
        ('"""One value."""', '"""A value,\n        at last."""', True),
        ('    """A noise."""\n\n', "", True),
        ("return scale * 2", "return (\n            scale * 2\n        )", True),
        ("scale * 2", "scale * 2.0", False),
        ("scale * 2", "2 * scale", False),
        ("scale: float", "scale: float = 1", False),
    ],
)
def test_only_what_code_does_counts(old: str, new: str, same: bool) -> None:
    assert old in CODE
    assert (code_hash([CODE.replace(old, new)]) == code_hash([CODE])) is same


def test_every_listed_module_is_there() -> None:
    hashes = {modules_hash(modules) for modules in (ENCODING_CODE, DEGRADATION_CODE, SURVEY_CODE)}
    assert len(hashes) == 3
