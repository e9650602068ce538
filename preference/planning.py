"""`--dry-run`: hours and storage of a job, from one pair that is made."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from preference.pair_maker import PairJob, PairMaker

#: clips tried before the job is called hopeless [ours]
_TRIED = 5


def estimate(job: PairJob, actors: int) -> str:
    """What the job takes if no clip is dropped; the second clip is timed, since the first warms up.

    Raises:
        UserError: as of `PairMaker`.
    """
    config = job.config
    with tempfile.TemporaryDirectory() as folder:
        few = config.model_copy(update={"niqe_clips": min(config.niqe_clips, 4)})
        maker = PairMaker(replace(job, config=few, output=Path(folder)))
        first = maker.make(0)
        started = time.perf_counter()
        count = min(_TRIED, maker.clips)
        outcomes = [maker.make(position) for position in range(1, count)] or [first]
        seconds = (time.perf_counter() - started) / len(outcomes) if count > 1 else 0.0
    made = [outcome.sample for outcome in (first, *outcomes) if outcome.sample]
    pairs = min(config.pairs, maker.clips)
    hours = seconds * pairs / actors / 3600
    lines = [f"{pairs} pairs of {maker.clips} clips, {config.candidates} candidates each, judged by {config.metrics}"]
    lines.append(f"{seconds:.3g} s per clip on {job.device}; {hours:.3g} h with {actors} actor(s)")
    if made:
        size = max(sum(map(len, sample.members.values())) for sample in made)
        lines.append(f"{size / 2**20:.3g} MiB per pair, {size * pairs / 2**30:.3g} GiB together")
    dropped = [outcome.dropped for outcome in (first, *outcomes) if outcome.dropped]
    lines += [f"{record['key']} would be dropped: {record['reason']}" for record in dropped]
    return "\n".join(lines)
