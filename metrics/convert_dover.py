"""DOVER's published weights to the ONNX file that the metric `dover` runs, without its authors' code.

    python -m metrics.convert_dover DOVER.pth

The file is read without running code from it. Its SHA-256 is printed and kept in the ONNX file's metadata.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch

from common.atomic import atomic_file
from common.errors import UserError, run_command
from common.fingerprint import file_sha256
from metrics.dover import Dover
from metrics.dover_network import DoverNetwork
from metrics.weights import load_state_dict

#: technical clips of the protocol, and frames of each view
CLIPS, FRAMES = 3, 32
SIDE = 224


def convert(weights: Path, output: Path, frames: int = FRAMES) -> str:
    """Write the ONNX file; returns the SHA-256 of `weights`.

    Raises:
        UserError: a package is missing, or the file does not hold DOVER's weights.
    """
    try:
        onnx: Any = importlib.import_module("onnx")
    except ImportError:
        raise UserError("the conversion needs the package onnx: pip install onnx") from None
    if not weights.is_file():
        raise UserError(f"no file {weights}; it is DOVER.pth of https://github.com/VQAssessment/DOVER")
    digest, state = file_sha256(weights), load_state_dict(weights)
    network = DoverNetwork().eval()
    try:
        network.load_published(state.get("state_dict", state))
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{weights} does not hold DOVER's weights ({_first_fault(error)}); get it again") from None
    views = torch.zeros(1, 3, frames, SIDE, SIDE), torch.zeros(CLIPS, 3, frames, SIDE, SIDE)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as temporary, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter announces its successor, which needs another package
        names = {"input_names": ["aes_view", "tech_view"], "output_names": ["aesthetic", "technical"]}
        torch.onnx.export(network, views, str(temporary), dynamo=False, opset_version=17, **names)
        model = onnx.load(str(temporary))
        onnx.helper.set_model_props(model, {"source_sha256": digest})
        onnx.save(model, str(temporary))
    return digest


def _first_fault(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    text = lines[1] if len(lines) > 1 else lines[0]
    return text if len(text) < 200 else f"{text[:200]} …"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="DOVER.pth as its authors publish it")
    parser.add_argument("--output", type=Path, help=f"default: {Dover.file} beside it")
    arguments = parser.parse_args()
    output = arguments.output or arguments.weights.with_name(Dover.file)
    digest = convert(arguments.weights, output)
    print(f"{arguments.weights}: SHA-256 {digest}\n{output}: SHA-256 {file_sha256(output)}")
    print("put its folder in --weights or $DUO_VSR_WEIGHTS, or the file in ~/.cache/duo-vsr/weights")


if __name__ == "__main__":
    run_command(main)
