"""Videos from S3, shards to S3, batches from S3, through a server that drops connections and answers 503."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from common.config import load_section
from common.errors import UserError
from common.lossless_clip import encode_bytes
from common.s3_lock import LOCK_NAME
from common.storage import NewFile, S3Folder, StorageConfig, open_folder
from datagen.config import DatagenConfig
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import Sample, read_manifest
from datagen.dataset.shard_index import write_index
from datagen.dataset.verify import faults
from datagen.encode.ray_jobs import encode, samples_of
from datagen.job_folder import writing
from datagen.plan import make_plan
from datagen.ray_cluster import start_ray
from datagen.sources import Source, find_sources
from metrics import compare, evaluate
from pipeline.model.config import ModelConfig
from tests.commands import python
from tests.datagen.conftest import SAMPLES, VARIANTS, moving_picture, refused, run_build, write_numbered
from tests.datagen.test_plan import surveyed
from tests.trainer import presets

pytestmark = pytest.mark.distributed

#: every n-th request meets a fault
FAULT_EVERY = 10
#: a long input, who works on it, and how far ahead
CLIPS, WORKERS, CLIPS_AHEAD = 100, 2, 8


class FaultyServer:
    """moto's S3 server behind a middleware: one fault in `every` requests, 503 and a dropped connection in turn."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.every: int | None = None
        self.faults = 0
        self.asked: set[str] = set()
        self._requests = itertools.count(1)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, environment: dict[str, Any], start_response: Any) -> Any:
        if environment["REQUEST_METHOD"] == "GET":
            self.asked.add(environment["PATH_INFO"])
        if self.every and next(self._requests) % self.every == 0:
            self.faults += 1
            if self.faults % 2:
                start_response("503 Slow Down", [("Content-Length", "0")])
                return [b""]
            environment["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("dropped on purpose")
        return self._app(environment, start_response)

    def stop(self) -> None:
        self._server.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    import logging

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", "testing"), ("AWS_SECRET_ACCESS_KEY", "testing")):
            patch.setenv(name, value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        faulty = FaultyServer()
        s3(faulty)._system.mkdir("bucket")
        yield faulty
        faulty.stop()


@pytest.fixture(autouse=True)
def no_faults_at_first(server: FaultyServer) -> None:
    server.every, server.faults = None, 0


def storage(server: FaultyServer) -> StorageConfig:
    return StorageConfig(endpoint_url=server.url)


def s3(server: FaultyServer, prefix: str = "") -> S3Folder:
    folder = open_folder(f"s3://bucket/{prefix}", storage(server))
    assert isinstance(folder, S3Folder)
    return folder


def upload(server: FaultyServer, local: Path, prefix: str) -> None:
    folder = s3(server, prefix)
    for path in sorted(local.rglob("*")):
        if path.is_file():
            folder.write(path.relative_to(local).as_posix(), path.read_bytes())


def test_reads_and_writes_survive_faults(server: FaultyServer) -> None:
    server.every = 3
    folder = s3(server, "files")
    for index in range(8):
        folder.write(f"a/{index}", bytes([index]) * 1000)
    assert folder.sizes("a/") == {f"a/{index}": 1000 for index in range(8)}
    for index in range(8):
        assert folder.read_range(f"a/{index}", 990, 100) == bytes([index]) * 10
    assert server.faults >= 4
    with pytest.raises(FileNotFoundError):
        folder.read("a/nothing")


def test_a_server_that_stays_away_is_named(server: FaultyServer) -> None:
    server.every = 1
    folder = open_folder("s3://bucket/x", StorageConfig(endpoint_url=server.url, attempts=2))
    with pytest.raises(UserError, match="s3://bucket/x: still failing after 2 attempts"):
        folder.read("y")


def test_an_output_in_s3_has_one_writer(server: FaultyServer) -> None:
    folder = s3(server, "locked")
    server.every = 5
    with (
        writing(folder),
        pytest.raises(UserError, match=f"another job is writing here .*process {os.getpid()}.* try again in 1.. s"),
        writing(s3(server, "locked")),
    ):
        raise AssertionError("both were let in")
    assert server.faults and folder.sizes() == {}
    # of a process that was killed, and of one elsewhere that is silent or is not
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder.write(LOCK_NAME, json.dumps({"host": socket.gethostname(), "pid": ended.pid, "token": "a"}).encode())
    with writing(folder):
        assert json.loads(folder.read(LOCK_NAME))["pid"] == os.getpid()
    folder.write(LOCK_NAME, json.dumps({"host": "elsewhere", "pid": 1, "token": "a"}).encode())
    with pytest.raises(UserError, match="host elsewhere, process 1"), writing(folder):
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.s3_lock.SILENT_S", 0.0)
        with writing(folder):
            pass
    # a writer that was silent leaves the lock to the one that took it over
    with writing(folder):
        folder.write(LOCK_NAME, json.dumps({"host": "elsewhere", "pid": 1, "token": "b"}).encode())
    assert json.loads(folder.read(LOCK_NAME))["token"] == "b"
    assert list(folder.sizes()) == [LOCK_NAME]


def test_a_large_file_is_uploaded_while_it_is_written(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, of which nothing is seen before its commit and nothing is left of one that has lost its writer."""
    monkeypatch.setattr("common.storage.PART_BYTES", 5 << 20)
    folder, content = s3(server, "large"), os.urandom(12 << 20)
    server.every = FAULT_EVERY

    def begin(name: str) -> NewFile:
        file = folder.new_file(name)
        for first in range(0, len(content), 1 << 20):
            file.write(content[first : first + (1 << 20)])
        return file

    def uploads() -> set[str]:
        return {upload["Key"] for upload in folder._system.list_multipart_uploads("bucket")}

    whole, discarded, _lost = begin("whole"), begin("discarded"), begin("lost")
    assert uploads() == {"large/discarded", "large/lost", "large/whole"} and folder.sizes() == {}
    whole.commit()
    discarded.discard()
    assert folder.sizes() == {"whole": len(content)} and folder.read("whole") == content
    with writing(folder):
        assert server.faults and uploads() == set()


def test_the_reader_gives_the_same_batches_from_s3(server: FaultyServer, tmp_path: Path) -> None:
    local = write_numbered(tmp_path / "dataset")
    write_index(open_folder(local), read_manifest(open_folder(local)).shards)
    upload(server, local, "numbered")
    server.asked.clear()
    expected = [batch.keys for batch in itertools.islice(ShardReader(local, seed=3, global_batch_size=6), 6)]
    server.every = FAULT_EVERY
    for cache in (None, tmp_path / "cache"):
        reader = ShardReader(
            "s3://bucket/numbered", seed=3, global_batch_size=6, cache_dir=cache, storage=storage(server)
        )
        assert [batch.keys for batch in itertools.islice(reader, 6)] == expected
    assert server.faults > 0
    assert {name for name in server.asked if name.endswith(".json")} == {"/bucket/numbered/manifest.json"}
    cached = sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))
    assert cached == sorted(path.name for path in local.rglob("*.tar"))
    # from now on whole shards come from the local disk
    server.every = None
    folder = s3(server, "numbered")
    for name in folder.sizes("shards/"):
        if name.endswith(".tar"):
            content = folder.read(name)
            folder.write(name, bytes(len(content)))
    reader = ShardReader(
        "s3://bucket/numbered", seed=3, global_batch_size=6, cache_dir=tmp_path / "cache", storage=storage(server)
    )
    assert [batch.keys for batch in itertools.islice(reader, 6)] == expected


def test_a_build_from_s3_to_s3_is_the_local_one(
    server: FaultyServer, videos: Path, config_file: Path, whole: Path
) -> None:
    upload(server, videos, "videos")
    s3(server, "videos").write("sub/video0.txt", b"drifting texture")
    captions = [source.caption for source in find_sources(["s3://bucket/videos"], storage(server), ".txt")]
    assert captions == ["drifting texture", None, None, None, None]
    s3(server, "videos").delete("sub/video0.txt")
    upload(server, whole, "earlier")
    place = ("s3://bucket/videos", "s3://bucket/built")
    with writing(s3(server, "built")):
        line = refused(config_file, *place, "--set", f"storage.endpoint_url={server.url}")
        assert "another job is writing here" in line
    server.every = FAULT_EVERY
    said = run_build(
        config_file, *place, *VARIANTS, "--set", f"storage.endpoint_url={server.url}", "--reuse", "s3://bucket/earlier"
    )
    assert server.faults > 3 and f"reused {SAMPLES}" in said
    server.every = None
    folder = s3(server, "built")
    assert list(faults(folder)) == []
    local = {path.relative_to(whole).as_posix(): path.read_bytes() for path in whole.glob("shards/*")}
    assert {name: folder.read(name) for name in folder.sizes("shards/")} == local


def test_clips_do_not_pile_up(server: FaultyServer, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the consumer holds still, the server sees how many clips are made ahead, each being a video of its own."""
    content = encode_bytes(moving_picture(9, 64, 64, 0))
    surveys = []
    for index in range(CLIPS):
        s3(server, "long").write(f"{index}.mkv", content)
        source = Source(f"{index}.mkv", f"s3://bucket/long/{index}.mkv")
        surveys.append(surveyed(source.id, source=source, width=64, height=64, frames=9))
    config = load_section(config_file, "datagen", DatagenConfig, [f"datagen.encode.clips_ahead={CLIPS_AHEAD}"])
    vae = str(load_section(config_file, "model", ModelConfig).vae)
    plans = make_plan(surveys, config, {}).samples
    server.asked.clear()
    ray.shutdown()  # one of its own: with the credentials of this server, and of this many CPUs
    monkeypatch.setattr("sys.executable", python())
    try:
        start_ray(None, WORKERS, config)
        blocks = encode(plans, config, storage(server), vae)
        made = next(blocks).samples
        asked = 0
        while len(server.asked) > asked:
            asked = len(server.asked)
            time.sleep(4)
        # the limit is in bytes of clips that do not compress, each with its lossless copy: this many at most, as
        # these copies are smaller, and what the tasks that ran meanwhile had in hand
        ahead = 2 * CLIPS_AHEAD * (WORKERS + 1)
        assert asked <= ahead + CLIPS // 5 < CLIPS
        samples = [sample for block in blocks for sample in samples_of(ray.get(block.reference), {}, 0, block.samples)]
    finally:
        ray.shutdown()
    assert made + len(samples) == CLIPS and all(isinstance(sample.made, Sample) for sample in samples)


def test_a_stage_trains_on_shards_in_s3(server: FaultyServer, tmp_path: Path) -> None:
    preset = presets.write_preset(tmp_path)
    upload(server, tmp_path / "clips", "clips")
    line = ["--config", preset, "--stage", "base", "--set", f"storage.endpoint_url={server.url}"]
    done = presets.run_command(*line, "--data", "s3://bucket/clips", "--output", tmp_path / "s3")
    assert done.returncode == 0, done.stderr
    done = presets.run_command(*line, "--data", tmp_path / "clips", "--output", tmp_path / "local")
    assert presets.losses(tmp_path / "s3") == presets.losses(tmp_path / "local")


def test_metrics_of_clips_in_s3(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = moving_picture(3, 32, 32, 0)
    for name, clip in (("hr", frames), ("out", frames // 2)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "clip.npy", clip)
        upload(server, tmp_path / name, name)
    scores = []
    for root in (str(tmp_path), "s3://bucket"):
        output = tmp_path / f"{len(scores)}.json"
        line = ["--video", f"{root}/out", "--reference", f"{root}/hr", "--output", str(output)]
        monkeypatch.setattr("sys.argv", ["evaluate", *line, "--set", f"storage.endpoint_url={server.url}"])
        evaluate.main()
        scores.append(json.loads(output.read_text())["clips"])
    assert scores[0] == scores[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    s3(server).write("out.method.yaml", b"seconds: 2.5\n")
    line = ["--method", "ours=s3://bucket/out", "--set", "one=s3://bucket/hr", "--output", str(tmp_path / "compared")]
    monkeypatch.setattr("sys.argv", ["compare", *line])
    compare.main()
    result = json.loads((tmp_path / "compared/compare.json").read_text())
    assert result["per_clip"]["one"]["ours"] == scores[0]
    assert result["methods"]["ours"] == {"folder": "s3://bucket/out", "seconds": 2.5, "parameters_b": None}
