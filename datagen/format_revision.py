"""What decides the bytes of a sample beside the plan: the revision of our own code, and the libraries' versions."""

from __future__ import annotations

from importlib.metadata import version

from datagen.dataset.shard_format import SCHEMA_VERSION
from datagen.degradation.sharpen import SharpenConfig

#: Revisions of our own code, kept by hand. Raise one whenever a change alters what it names: datasets made before can
#: then be neither resumed nor reused by mistake. tests/datagen/test_golden_bytes.py fails when bytes change.
#: How a video becomes z_hr: decoded, cropped, encoded.
ENCODING_REVISION = 2
#: How HR becomes LR.
DEGRADATION_REVISION = 2
#: What the survey measures. Its finished parts are resumed only at the same revision.
SURVEY_REVISION = 2

PACKAGES = ("duo-vsr", "av", "numpy", "opencv-python-headless", "safetensors", "torch")


def code_versions(sharpening: SharpenConfig | None = None) -> dict[str, str]:
    """Revisions and package versions that decide the bytes of a sample; recorded in each sample and the manifest.

    Args:
        sharpening: of the HR clips, which decides z_hr as the revision does.
    """
    encoding = str(ENCODING_REVISION)
    if sharpening:
        encoding += f", sharpened {sharpening.kernel_size}/{sharpening.weight}/{sharpening.threshold}"
    return {"schema": str(SCHEMA_VERSION), "encoding": encoding, "degradation": str(DEGRADATION_REVISION)} | {
        package: version(package) for package in PACKAGES
    }
