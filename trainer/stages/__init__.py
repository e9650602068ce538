"""The stages of training: `STAGES` by name. A stage is one file, Stage II and the fast codec a folder."""

from __future__ import annotations

import difflib

from common.errors import UserError
from common.plugins import load_object
from trainer.stages import base, codec, preference, progressive
from trainer.stages.dual_stream import spec as dual_stream
from trainer.stages.fast_codec.spec import FAST_DECODER, LR_ENCODER
from trainer.stages.stage import StageSpec

#: in the order in which they are trained
STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (codec.SPEC, base.SPEC, progressive.SPEC, dual_stream.SPEC, preference.SPEC, FAST_DECODER, LR_ENCODER)
}


def find_stage(name: str) -> StageSpec:
    """The stage called `name`, or the spec at `package.module:SPEC`.

    Raises:
        UserError: there is none.
    """
    if ":" in name:
        return load_object(name, StageSpec, option="--stage")
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        suggestion = f"did you mean {near[0]}?" if near else f"known: {', '.join(STAGES)}"
        raise UserError(f"--stage {name}: {suggestion} (a stage of your own: package.module:SPEC)")
    return STAGES[name]
