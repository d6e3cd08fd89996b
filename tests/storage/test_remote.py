"""Remote checkpoints, on a directory as the store: what is pushed, what comes back, one owner."""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from src.storage import address
from src.storage.checkpoint import NoValidCheckpoint, load_latest, manifest_bytes
from src.storage.object_store import ObjectStore
from src.storage.remote import Remote, Timing
from src.storage.run_dir import Held, RunDir
from tests.storage import DIGESTS, FAST, check_store, state_of, train

# --- a directory as the store -------------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> str:
    (tmp_path / "store").mkdir()
    return f"file://{tmp_path / 'store'}"


def _files(tmp_path: Path, pattern: str) -> list[Path]:
    return sorted((tmp_path / "store" / "r").glob(pattern))


def _pushed(store: str, tmp_path: Path, *steps: int) -> Path:
    """A run directory whose checkpoints of `steps` are in the store; the owner has left."""
    with RunDir.open(tmp_path / "a", "r") as here:
        remote = Remote.open(store, "r", local=here.path, timing=FAST)
        for step in steps:
            train(here, step, remote)
            assert remote.drain(20)
        assert remote.close(20)
        return here.path


def _fetch(store: str, log_dir: Path) -> tuple[int | None, Path]:
    with RunDir.open(log_dir, "r") as there:
        remote = Remote.open(store, "r", local=there.path, timing=FAST)
        try:
            return remote.fetch_latest(there, digests=DIGESTS), there.path
        finally:
            remote.close(20)


def test_the_newest_of_what_waits_is_pushed(store, tmp_path, monkeypatch):
    gate = threading.Event()
    upload = Remote._upload_checkpoint

    def waiting(self, *job):
        assert gate.wait(20)
        upload(self, *job)

    monkeypatch.setattr(Remote, "_upload_checkpoint", waiting)
    with RunDir.open(tmp_path / "a", "r") as here:
        remote = Remote.open(store, "r", timing=FAST)
        train(here, 10, remote)
        while remote._jobs:  # until the thread has taken it
            time.sleep(0.01)
        for step in (20, 30, 40):
            train(here, step, remote)
        gate.set()  # by now the local copy of 10 is pruned
        assert remote.close(20)
    assert check_store(fs.LocalFileSystem(), str(tmp_path / "store" / "r")) == [10, 40]


def test_bytes_that_read_back_differently_are_written_again(store, tmp_path, monkeypatch):
    real, lies = ObjectStore.sha256, []

    def lying(self, key):
        if key.endswith(".pt") and len(lies) < 2:
            lies.append(key)
            return "0" * 64
        return real(self, key)

    monkeypatch.setattr(ObjectStore, "sha256", lying)
    _pushed(store, tmp_path, 10)
    assert len(lies) == 2
    assert check_store(fs.LocalFileSystem(), str(tmp_path / "store" / "r")) == [10]


def test_a_damaged_object_is_not_pushed(store, tmp_path, caplog):
    with RunDir.open(tmp_path / "a", "r") as here:
        train(here, 10)
        object_path = next(here.checkpoints.glob("*.pt"))
        broken = bytearray(object_path.read_bytes())
        broken[len(broken) // 2] ^= 1
        object_path.write_bytes(broken)
        remote = Remote.open(store, "r", timing=FAST)
        remote.push(object_path, here.checkpoints / "step-00000010.json", here.metrics_path)
        assert remote.drain(20)
        remote.close(20)
    assert "has changed since it was saved" in caplog.text
    assert not (tmp_path / "store" / "r" / "manifests").exists()


@pytest.mark.parametrize("victim", ["objects/*.pt", "objects/*.jsonl", "manifests/*.json"])
def test_damage_in_the_store_falls_back_then_refuses(store, tmp_path, victim, caplog):
    _pushed(store, tmp_path, 10, 20)
    for path in _files(tmp_path, victim):
        if "step-00000020" in path.name:
            path.write_bytes(path.read_bytes()[:-1])
    step, path = _fetch(store, tmp_path / "b")
    assert step == 10 and "trying the one before" in caplog.text
    assert torch.equal(
        load_latest(path / "checkpoints", digests=DIGESTS)[0]["w"], state_of(10)["w"]
    )
    for path in _files(tmp_path, victim):
        path.write_bytes(b"")
    with pytest.raises(NoValidCheckpoint, match="none that can be trusted"):
        _fetch(store, tmp_path / "c")


def test_what_is_fetched_must_be_this_run(store, tmp_path):
    _pushed(store, tmp_path, 10)
    with RunDir.open(tmp_path / "b", "r") as there:
        remote = Remote.open(store, "r", timing=FAST)
        with pytest.raises(ValueError, match="digests.tokenizer"):
            remote.fetch_latest(there, digests=DIGESTS | {"tokenizer": "t2"})
        assert list(there.checkpoints.iterdir()) == []
        remote.close(20)


def test_a_local_checkpoint_that_is_ahead_is_kept(store, tmp_path):
    path = _pushed(store, tmp_path, 10)
    with RunDir.open(path.parent, "r") as here:
        train(here, 20)
        rows = here.metrics_path.read_bytes()
    assert _fetch(store, path.parent)[0] is None
    assert (path / "metrics.jsonl").read_bytes() == rows
    newest = next((path / "checkpoints").glob("step-00000020-*.pt"))
    newest.write_bytes(b"damaged")
    next((path / "checkpoints").glob("step-00000010-*.pt")).write_bytes(b"damaged")
    assert _fetch(store, path.parent)[0] == 10  # the store repairs a damaged disk


def test_an_empty_store_is_no_checkpoint(store, tmp_path):
    assert _fetch(store, tmp_path / "b")[0] is None


def test_a_finished_run_comes_back_whole(store, tmp_path):
    with RunDir.open(tmp_path / "a", "r") as here:
        remote = Remote.open(store, "r", timing=FAST)
        train(here, 10, remote)
        here.finish({"dev_loss": 1.0})
        (here.path / "final").mkdir()
        (here.path / "final" / "config.json").write_text("{}")
        names = ["metrics.jsonl", "metrics.json", "final/config.json"]
        remote.push_final(here, names, DIGESTS)
        assert remote.close(20)
        with RunDir.open(tmp_path / "b", "r") as there:
            other = Remote.open(store, "r", timing=FAST)
            with pytest.raises(ValueError, match=r"digests.data"):
                other.fetch_final(there, digests=DIGESTS | {"data": "x"})
            assert there.finished() is None
            assert other.fetch_final(there, digests=DIGESTS)
            assert there.finished() == {"dev_loss": 1.0}
            assert all((there.path / n).read_bytes() == (here.path / n).read_bytes() for n in names)
            assert there.rows() == here.rows() != []
            other.close(20)
    with RunDir.open(tmp_path / "c", "q") as fresh:
        another = Remote.open(store, "q", timing=FAST)
        assert not another.fetch_final(fresh, digests=DIGESTS)
        another.close(20)


# --- one owner ----------------------------------------------------------------------------------


def test_a_living_owner_is_respected_and_named(store, tmp_path):
    first = Remote.open(store, "r", timing=FAST)
    with pytest.raises(Held) as caught:
        Remote.open(store, "r", timing=FAST)
    assert caught.value.host == socket.gethostname() and caught.value.pid
    assert first.close(20)
    second = Remote.open(store, "r", timing=FAST)
    assert second.owner.generation == 2
    second.close(20)


def test_a_dead_owner_is_replaced_and_stops_when_it_wakes(store, tmp_path):
    """The first owner sleeps through its replacement (long heartbeat), then pushes."""
    asleep = Timing(heartbeat_s=1e6, settle_s=0.05, backoff_s=0.05)
    dead_at_once = Timing(heartbeat_s=0.2, stale_s=0.0, settle_s=0.05, backoff_s=0.05)
    with RunDir.open(tmp_path / "a", "r") as here, RunDir.open(tmp_path / "b", "r") as there:
        first = Remote.open(store, "r", timing=asleep)
        train(here, 10, first)
        assert first.drain(20)
        second = Remote.open(store, "r", timing=dead_at_once)
        assert second.fetch_latest(there, digests=DIGESTS) == 10
        train(here, 30, first)
        assert not first.drain(20) and first.fenced
        assert not _files(tmp_path, "objects/*-step-00000030-*")  # it did not even upload
        train(there, 20, second)
        assert second.drain(20) and not second.fenced
        assert check_store(fs.LocalFileSystem(), str(tmp_path / "store" / "r")) == [10, 20]
        train(here, 40, first)  # a fenced writer ignores what it is given
        assert not first.close(1) and second.close(20)


def test_an_owner_replaced_during_its_upload_writes_no_manifest(store, tmp_path, monkeypatch):
    first = Remote.open(store, "r", timing=Timing(heartbeat_s=1e6, settle_s=0.0))
    put, seconds = ObjectStore.put, []

    def put_then_replace(self, key, source):
        put(self, key, source)
        if key.endswith(".jsonl"):
            seconds.append(Remote.open(store, "r", timing=Timing(stale_s=0.0, settle_s=0.0)))

    monkeypatch.setattr(ObjectStore, "put", put_then_replace)
    with RunDir.open(tmp_path / "a", "r") as here:
        train(here, 10, first)
        assert not first.drain(20) and first.fenced
    assert len(_files(tmp_path, "objects/*")) == 2 and not _files(tmp_path, "manifests/*")
    assert seconds[0].close(20) and not first.close(1)


def test_a_heartbeat_alone_notices_the_fence(store):
    first = Remote.open(store, "r", timing=FAST)
    dead_at_once = Timing(stale_s=0.0, settle_s=0.0)
    second = Remote.open(store, "r", timing=dead_at_once)
    deadline = time.monotonic() + 20
    while not first.fenced and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first.fenced and not second.fenced
    assert second.close(20) and not first.close(1)


def test_what_a_fenced_writer_still_lands_does_not_hide_the_winner(store, tmp_path):
    _pushed(store, tmp_path, 10)
    late = json.loads(_files(tmp_path, "manifests/*")[0].read_text())
    _, path = _fetch(store, tmp_path / "b")
    with RunDir.open(path.parent, "r") as there:
        remote = Remote.open(store, "r", local=there.path, timing=FAST)
        train(there, 20, remote)
        assert remote.close(20)
    late["manifest"]["step"] = 99
    name = f"g00001-{late['owner']['token'][:8]}-step-00000099.json"
    (tmp_path / "store" / "r" / "manifests" / name).write_bytes(manifest_bytes(late))
    assert _fetch(store, tmp_path / "c")[0] == 20


def test_a_manifest_of_a_later_owner_fences(store, tmp_path):
    """owner.json says that we own the run, as after a delayed write; the manifests know better."""
    first = Remote.open(store, "r", timing=Timing(heartbeat_s=1e6, settle_s=0.0))
    folder = tmp_path / "store" / "r" / "manifests"
    folder.mkdir()
    (folder / "g00007-01234567-step-00000005.json").write_bytes(b"")
    with RunDir.open(tmp_path / "a", "r") as here:
        train(here, 10, first)
        assert not first.drain(20) and first.fenced
    assert len(list(folder.iterdir())) == 1
    first.close(1)


def test_exactly_one_of_two_that_start_together_wins(store):
    for number in range(5):
        outcomes: list[Remote | Held] = []
        barrier = threading.Barrier(3)

        def claim(name=f"r{number}", outcomes=outcomes, barrier=barrier):
            barrier.wait()
            try:
                outcomes.append(Remote.open(store, name, timing=FAST))
            except Held as held:
                outcomes.append(held)

        threads = [threading.Thread(target=claim) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        winners = [o for o in outcomes if isinstance(o, Remote)]
        assert len(outcomes) == 3 and len(winners) == 1
        winners[0].close(20)


def test_the_same_directory_takes_over_from_its_killed_process(store, tmp_path):
    with RunDir.open(tmp_path / "a", "r") as here:
        killed = Remote.open(store, "r", local=here.path, timing=Timing(settle_s=0.0))
        again = Remote.open(store, "r", local=here.path, timing=FAST)
        assert again.owner.generation == killed.owner.generation + 1
        with pytest.raises(Held):
            Remote.open(store, "r", local=tmp_path, timing=FAST)
        again.close(20)
        killed.close(1)


def test_a_copied_directory_does_not_take_over_from_a_living_one(store, tmp_path):
    with RunDir.open(tmp_path / "a", "r") as here:
        first = Remote.open(store, "r", local=here.path, timing=FAST)
        shutil.copytree(here.path, tmp_path / "b" / "r")
        with pytest.raises(Held):
            Remote.open(store, "r", local=tmp_path / "b" / "r", timing=FAST)
        first.close(20)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://host/x", "expected one of s3://"),
        ("bucket/prefix", "expected one of s3://"),
        ("s3://key:secret@bucket/prefix", "holds credentials"),
        ("s3://key@bucket/prefix", "holds credentials"),
        ("s3:///prefix", "no bucket"),
        ("s3://bucket/prefix?request_timeout=3", "request_timeout"),
        ("s3://bucket/prefix?access_key=secret", "access_key"),
        ("abfs://account:secret@container/x", "holds credentials"),
        ("abfss://account/container?sig=secret", "credentials belong in the environment"),
        ("gs://bucket/x?access_token=secret", "access_token"),
        ("gcs://bucket/x", "found gcs scheme"),
        ("htps://key:secret@host/x", "found htps scheme"),
        ("file:///", "no bucket or path"),
        ("s3://[secret/x", "no address"),
    ],
)
def test_unusable_uris_are_refused_without_repeating_secrets(uri, message):
    """As every door refuses them before it writes: `address.check` is what they call."""
    with pytest.raises(ValueError, match=message):
        address.check(uri)
    with pytest.raises(ValueError, match=message) as caught:
        Remote.open(uri, "r")
    assert "secret" not in str(caught.value)
