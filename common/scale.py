"""The scale of super-resolution."""

#: HR is this many times as wide and as high as LR [paper]
SCALE = 4
