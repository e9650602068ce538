"""As many processes as there are cores run the tests: one thread in each, set before PyTorch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
