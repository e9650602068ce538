"""What the demo's report says: images, curves, tables and a plain word on what the tiny model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg

from demo.contact_sheet import contact_sheet

#: method -> what a reader calls it
LABELS = {
    "bicubic": "bicubic",
    "base": "base, 8 steps",
    "progressive": "stage I, one step",
    "dual_stream": "stage II, one step",
    "preference": "stage III, one step",
    "shipped": "shipped model, one step",
}
SHOWN_SEED = 1
SHOWN_FRAME = 8
#: places shown 1:1, (x, y, width, height) in the 448 x 256 frame
CROPS = ((296, 16, 112, 112), (20, 40, 112, 112), (190, 60, 112, 112))

#: stage -> numbers of its metrics.jsonl that are drawn
CURVES = {
    "base": {"loss": "flow matching"},
    "progressive": {"loss": "distillation"},
    "dual_stream": {"loss_diffusion": "fake score", "loss_discriminator": "heads", "loss_dmd": "DMD",
                    "loss_feature_matching": "feature matching"},
    "preference": {"loss_dpo": "DPO"},
}  # fmt: skip

SUMMARY = (
    "Everything on this page was made by one run of “make demo” on this machine's CPU: real video clips were cut, "
    "degraded and encoded into shards, a small base model was trained on, distilled to one step in the three stages of "
    "DUO-VSR, and then shown a clip that none of its training has seen.",
    "What this is: the full system at small size, each part the real one (Ray Data, DeepSpeed, the three-engine step "
    "of stage II, preference pairs). What it is not: the paper's model. The model has 4.7 million parameters instead "
    "of 1.3 billion, and its base was pre-trained on photographs for hours of one CPU core. This run trains each "
    "stage for a minute or two; the shipped model is what longer training gave, with a decoder that sees the LR clip "
    "(docs/small.md). Both are sharper than bicubic mostly by the convolutional prediction that is part of the model; "
    "the stages add little to it yet (docs/effect.md).",
)
#: columns of the README's image
SHOWN_METHODS = ("bicubic", "shipped")


def describe(output: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """The JSON description for `python -m metrics.report`; writes the frames it shows, and demo.png."""
    frames = extract_frames(output, "test", tuple(metrics["methods"]))
    shown = {LABELS[method]: frames[LABELS[method]] for method in SHOWN_METHODS}
    contact_sheet({**shown, "ground truth": frames["ground truth"]}, CROPS[0], output / "demo.png")
    seeds = ", ".join(map(str, metrics["degradation_seeds"]))
    return {
        "title": "DUO-VSR on a CPU",
        "subtitle": "raw videos to a one-step ×4 model, end to end",
        "summary": list(SUMMARY),
        "scenes": [
            scene(
                output,
                frames,
                f"A clip it has never seen ({metrics['held_out']['clip']})",
                f"Degraded once with seed {SHOWN_SEED}; frame {SHOWN_FRAME + 1} of 17. One step means one "
                "evaluation of the transformer per clip.",
            ),
            scene(
                output,
                extract_frames(output, "blind", tuple(metrics["blind"]["methods"])),
                f"A clip by which nothing was chosen ({metrics['blind']['held_out']['clip']})",
                f"{blind_figures(metrics['blind']['methods'])} Means over degradation seeds {seeds}.",
            ),
        ],
        "methods": metrics["methods"],
        "methods_title": "Figures on the held-out clip",
        "methods_note": f"Means over degradation seeds {seeds}, the same low-resolution clips for every method. "
        "Seconds are those of encoding, transformer and decoding together. NIQE is fitted on the training clips, so "
        "its figures compare within this table only.",
        "curves": [curve(stage, series) for stage, series in CURVES.items()],
        "seconds": by_kind(metrics["seconds"]),
        "published": True,
        "notes": [
            "Seeds, command lines and the figures of every seed are in metrics.json beside this page.",
            "PSNR rewards the mean of what could be there, NIQE one plausible sample of it: read them together.",
        ],
    }


def scene(output: Path, frames: dict[str, Path], title: str, caption: str) -> dict[str, Any]:
    """One clip's images."""
    return {
        "title": title,
        "caption": caption,
        "frames": [{"label": label, "image": str(path.relative_to(output))} for label, path in frames.items()],
        "crops": [list(crop) for crop in CROPS],
        "compare": [LABELS["bicubic"], LABELS["shipped"]],
    }


def blind_figures(methods: dict[str, dict[str, float]]) -> str:
    """The figures of the second clip in a sentence each."""
    return " ".join(
        f"{LABELS[method][0].upper()}{LABELS[method][1:]}: PSNR {values['psnr']:.2f} dB, "
        f"VMAF-NEG {values['vmaf_neg']:.1f}, fitted NIQE {values['niqe_fitted']:.2f}."
        for method, values in methods.items()
    )


def kind_of(step: str) -> str:
    """The name of a step without clip, method and seed: `upscale` for `blind-upscale-bicubic`."""
    return step.removeprefix("blind-").split("-")[0]


def by_kind(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of steps of one kind, added up."""
    sums: dict[str, float] = {}
    for name, value in seconds.items():
        kind = kind_of(name).replace("_", " ")
        sums[kind] = sums.get(kind, 0.0) + value
    return sums


def curve(stage: str, series: dict[str, str]) -> dict[str, Any]:
    """Loss curves of one stage."""
    return {
        "title": stage.replace("_", " "),
        "log_y": stage in ("base", "progressive"),
        "series": [{"label": label, "file": f"{stage}/metrics.jsonl", "y": key} for key, label in series.items()],
    }


def extract_frames(output: Path, results: str, methods: tuple[str, ...]) -> dict[str, Path]:
    """One frame of every method as PNG, and the LR frame enlarged without interpolation."""
    folder = output / "frames" / results
    folder.mkdir(parents=True, exist_ok=True)
    frames = {"low resolution, enlarged": folder / "low.png"}
    grab(output / results / f"low/seed-{SHOWN_SEED}.mkv", frames["low resolution, enlarged"], scale=4)
    for method in methods:
        frames[LABELS[method]] = folder / f"{method}.png"
        grab(output / results / f"{method}/seed-{SHOWN_SEED}.mkv", frames[LABELS[method]])
    frames["ground truth"] = folder / "reference.png"
    grab(output / results / f"reference/seed-{SHOWN_SEED}.mkv", frames["ground truth"])
    return frames


def grab(video: Path, image: Path, scale: int = 1) -> None:
    """Save frame `SHOWN_FRAME`."""
    stream = ffmpeg.input(str(video)).filter("select", f"eq(n,{SHOWN_FRAME})")
    if scale != 1:
        stream = stream.filter("scale", f"iw*{scale}", f"ih*{scale}", flags="neighbor")
    stream = stream.output(str(image), vframes=1, fps_mode="passthrough").overwrite_output()
    stream.global_args("-loglevel", "error", "-nostdin").run(cmd=imageio_ffmpeg.get_ffmpeg_exe())
