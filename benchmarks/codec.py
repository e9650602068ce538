"""The fast codec beside the VAE that it stands in for: what it costs, and what it keeps.

    python benchmarks/codec.py [--seconds 5x128x224] [--model MODEL [--clips FOLDER] [--seeds 0 1 2]]

Costs are of Wan2.1's VAE and three sizes of the fast networks, with random weights, which say nothing of quality.
Operations (torch's counter) and the peak of live tensors are those of the meta device, where nothing is computed.
Seconds are CPU seconds of one thread, at a size that a CPU finishes. The VAE encodes the enlarged clip, the fast
encoder the LR one.

With --model, a folder that holds the trained networks, the held-out clips of benchmarks/effect/held_out.py are degraded
with each seed, and both decoders decode z_HR and the student's latent (benchmarks/codec_quality.py). The last line is
JSON; the ratios are full over fast at 21 x 480 x 832 with the middle networks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, from anywhere

from benchmarks import codec_quality
from common.errors import UserError, run_command
from common.live_bytes import LiveBytes
from pipeline.latent_codec import FastCodec, FullCodec, LatentCodec
from pipeline.model.fast_codec import FastDecoder, LowResolutionEncoder

FRAMES = 21
SIZES = ((480, 832), (704, 1280), (1088, 1920))
#: decoder (dims, blocks) and encoder (dim, blocks)
NETWORKS: dict[str, tuple[Any, Any]] = {
    "small": (((128, 96, 48, 24), (4, 2, 1)), (96, 3)),
    "middle": (((256, 128, 64, 32), (6, 2, 1)), (192, 4)),
    "large": (((448, 192, 96, 48), (7, 2, 1)), (320, 6)),
}
MIB = 2**20


def codecs() -> dict[str, LatentCodec]:
    """Wan2.1's VAE and the fast codecs, random weights, where the default device is."""
    vae = AutoencoderKLWan().requires_grad_(False).eval()
    found: dict[str, LatentCodec] = {"full": FullCodec(vae)}
    for name, (decoder, encoder) in NETWORKS.items():
        networks = LowResolutionEncoder(16, *encoder), FastDecoder(16, *decoder)
        found[name] = FastCodec(vae, *(network.requires_grad_(False).eval() for network in networks))
    return found


def parameters(codec: LatentCodec) -> tuple[float, float]:
    """Millions: encoder, decoder."""
    owner: Any = codec.vae if isinstance(codec, FullCodec) else codec
    parts = (owner.encoder, owner.decoder)
    encoder, decoder = (sum(value.numel() for value in part.parameters()) / 1e6 for part in parts)
    return encoder, decoder


def passes(codec: LatentCodec, frames: int, height: int, width: int) -> dict[str, Callable[[], Any]]:
    """Encoding and decoding one clip of that output size."""
    places = (height // 8, width // 8)
    inputs = torch.zeros(1, 3, frames, *(codec.place_px * place for place in places))
    z = torch.zeros(1, 16, (frames - 1) // 4 + 1, *places)
    return {"encode": lambda: codec.encode(inputs), "decode": lambda: codec.decode(z, inputs)}


def counted(codec: LatentCodec, frames: int, height: int, width: int) -> dict[str, float]:
    """Operations and bytes of a clip, on the meta device."""
    found = {}
    for name, run in passes(codec, frames, height, width).items():
        with FlopCounterMode(display=False) as counter:
            run()
        with LiveBytes("meta") as live:
            run()
        found |= {f"{name}_flops": float(counter.get_total_flops()), f"{name}_bytes": float(live.peak)}
    return found


def timed(codec: LatentCodec, frames: int, height: int, width: int) -> dict[str, float]:
    """CPU seconds of a clip on one thread; short passes are repeated, and the shortest counts."""
    found = {}
    for name, run in passes(codec, frames, height, width).items():
        tries: list[float] = []
        while not tries or (sum(tries) < 10 and len(tries) < 3):
            began = time.process_time()
            run()
            tries.append(time.process_time() - began)
        found[f"{name}_seconds"] = min(tries)
    return found


def ratios(full: dict[str, float], fast: dict[str, float]) -> dict[str, float]:
    """Full over fast, by name."""
    return {f"{name}_ratio": round(full[name] / fast[name], 2) for name in full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", default="5x128x224", help="frames x height x width of what is timed")
    parser.add_argument("--model", type=Path, help="a model folder with a fast codec: what it keeps is measured too")
    parser.add_argument("--clips", type=Path, help="folder of the held-out clips, instead of the installed wheels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the degradation")
    arguments = parser.parse_args()
    try:
        size = tuple(int(part) for part in arguments.seconds.split("x"))
        frames, height, width = size
    except ValueError:
        raise UserError(f"--seconds {arguments.seconds}: give FRAMESxHEIGHTxWIDTH, as 5x128x224") from None
    if frames % 4 != 1 or height % 16 or width % 16:
        raise UserError(f"--seconds {arguments.seconds}: 4k + 1 frames, sides multiples of 16")
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    print("| frames | codec | encode, TFLOP | decode, TFLOP | encode, MiB | decode, MiB |", "|---" * 6 + "|", sep="\n")
    with torch.device("meta"):
        on_meta = codecs()
        for lines, columns in SIZES:
            for name, codec in on_meta.items():
                found = counted(codec, FRAMES, lines, columns)
                result[f"{name} {lines}x{columns}"] = found
                print(
                    f"| {FRAMES} x {lines} x {columns} | {name} | {found['encode_flops'] / 1e12:.3f} "
                    f"| {found['decode_flops'] / 1e12:.3f} | {found['encode_bytes'] / MIB:.0f} "
                    f"| {found['decode_bytes'] / MIB:.0f} |",
                    flush=True,
                )
    print("", "| codec | encoder, M | decoder, M | encode, s | decode, s |", "|---" * 5 + "|", sep="\n")
    for name, codec in codecs().items():
        found = timed(codec, frames, height, width)
        result[f"{name} seconds"] = found
        encoder, decoder = parameters(codec)
        times = f"{found['encode_seconds']:.2f} | {found['decode_seconds']:.2f}"
        print(f"| {name} | {encoder:.1f} | {decoder:.1f} | {times} |", flush=True)
    where = "{}x{}".format(*SIZES[0])
    summary = ratios(result[f"full {where}"], result[f"middle {where}"])
    summary |= ratios(result["full seconds"], result["middle seconds"])
    if arguments.model:
        result["quality"] = codec_quality.rows(arguments.model, arguments.clips, arguments.seeds)
        print("", codec_quality.table(result["quality"]), sep="\n")
    print(json.dumps({**summary, "timed": arguments.seconds, "all": result}))


if __name__ == "__main__":
    run_command(main)
