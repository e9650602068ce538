"""What decides the bytes of a sample beside the plan: our own code's revision, the libraries' versions, the VAE."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from common.errors import UserError
from common.fingerprint import files_fingerprint
from datagen.dataset.shard_format import SCHEMA_VERSION
from datagen.degradation.sharpen import SharpenConfig

#: Revisions of our own code, kept by hand. Raise one whenever a change alters what it names: datasets made before can
#: then be neither resumed nor reused by mistake. tests/datagen/test_golden_bytes.py fails when bytes change.
#: How a video becomes z_hr: decoded, cropped, encoded.
ENCODING_REVISION = 2
#: How HR becomes LR.
DEGRADATION_REVISION = 2
#: What the survey and the filter of crops measure. Finished surveys are resumed only at the same revision.
SURVEY_REVISION = 4

PACKAGES = ("duo-vsr", "av", "numpy", "opencv-python-headless", "safetensors", "torch")


def code_versions(sharpening: SharpenConfig | None = None) -> dict[str, str]:
    """Revisions and package versions that decide the bytes of a sample; recorded in each sample and the manifest.

    Args:
        sharpening: of the HR clips, which decides z_hr as the revision does.
    """
    encoding = str(ENCODING_REVISION)
    if sharpening:
        encoding += f", sharpened {sharpening.kernel_size}/{sharpening.weight}/{sharpening.threshold}"
    own = {"encoding": encoding, "degradation": str(DEGRADATION_REVISION), "survey": str(SURVEY_REVISION)}
    return {"schema": str(SCHEMA_VERSION)} | own | {package: version(package) for package in PACKAGES}


def vae_hash(folder: Path) -> str:
    """SHA-256 over the configuration and weights of a VAE folder: equal hashes give equal latents.

    Raises:
        UserError: no such folder, or no safetensors in it.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"model.vae: {folder} holds no VAE (config.json and *.safetensors); see the README on weights")
    return files_fingerprint(files, folder)
