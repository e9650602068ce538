"""How many bits each channel of a written frame has."""

from typing import Literal

BitDepth = Literal[8, 10, 16]
