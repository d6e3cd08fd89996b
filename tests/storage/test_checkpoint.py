"""Checkpoints: bitwise round trip, every kind of damage found, every crash state legal."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.storage import checkpoint, run_dir
from src.storage.checkpoint import NoValidCheckpoint, load_latest, manifest_bytes, save
from tests import ROOT
from tests.storage import DIGESTS

ENVIRONMENT = {"torch": torch.__version__, "threads": 1}


def _state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(5, 7, generator=generator), "b": torch.zeros(3).bfloat16()},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step)), "nested": [1, (2.5, "x")]}}},
        "cursor": step,
        "elapsed_s": 0.1 + 0.2,
        "none": None,
    }


def _save(directory: Path, step: int, **kwargs) -> Path:
    return save(
        directory, _state(step), step=step, digests=DIGESTS, environment=ENVIRONMENT, **kwargs
    )


def _load(directory: Path):
    return load_latest(directory, digests=DIGESTS)


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def two(tmp_path) -> Path:
    """A directory with checkpoints of steps 100 and 200."""
    directory = tmp_path / "checkpoints"
    _save(directory, 100)
    _save(directory, 200)
    return directory


def _falls_back(directory: Path, match: str = "set aside") -> None:
    with pytest.warns(UserWarning, match=match):
        loaded = _load(directory)
    assert loaded is not None and loaded[1]["step"] == 100 and _equal(loaded[0], _state(100))


def test_round_trip_is_exact_and_the_manifest_says_what_it_is(two):
    state, manifest = _load(two)
    assert _equal(state, _state(200))
    data = (two / manifest["file"]).read_bytes()
    assert manifest["step"] == 200 and manifest["size"] == len(data)
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["digests"] == DIGESTS and manifest["environment"] == ENVIRONMENT
    assert manifest["schema"] == 1 and manifest["generation"] == 2


def test_nothing_saved_is_none(tmp_path):
    assert _load(tmp_path / "missing") is None
    assert _load(tmp_path) is None


def test_newest_two_are_kept_by_step_whatever_the_clock_says(tmp_path):
    for step in (100, 200, 300):
        _save(tmp_path, step)
        for path in tmp_path.glob(f"step-{step:08d}*"):  # the clock runs backwards
            os.utime(path, (10**9 - step, 10**9 - step))
    assert [n for n in _names(tmp_path) if n.endswith("json")] == [
        "step-00000200.json",
        "step-00000300.json",
    ]
    assert len(_names(tmp_path)) == 4
    assert _load(tmp_path)[1]["step"] == 300


def test_saving_a_step_again_replaces_it(two):
    state = _state(200) | {"cursor": "again"}
    save(two, state, step=200, digests=DIGESTS, environment=ENVIRONMENT)
    loaded, manifest = _load(two)
    assert loaded["cursor"] == "again" and manifest["generation"] == 3 and len(_names(two)) == 4


def test_on_saved_is_called_last_with_verified_files(tmp_path):
    calls = []

    def on_saved(object_path, manifest_path):
        manifest = json.loads(manifest_path.read_text())
        calls.append((object_path.name == manifest["file"], manifest["step"], _names(tmp_path)))

    for step in (1, 2, 3):
        _save(tmp_path, step, on_saved=on_saved)
    assert [(ok, step, len(names)) for ok, step, names in calls] == [
        (True, 1, 2),
        (True, 2, 4),
        (True, 3, 4),
    ]


# --- damage -------------------------------------------------------------------------------------


def test_every_bit_flip_is_found(two):
    """In the object (200 of its bits) and in the manifest (200 of its bits)."""
    draw = random.Random(0)
    object_name = next(n for n in _names(two) if n.startswith("step-00000200-"))
    for name in (object_name, "step-00000200.json"):
        path = two / name
        whole = path.read_bytes()
        for bit in draw.sample(range(8 * len(whole)), 200):
            broken = bytearray(whole)
            broken[bit // 8] ^= 1 << bit % 8
            path.write_bytes(broken)
            with pytest.raises(checkpoint.Bad):
                checkpoint.read_object(two, checkpoint.read_manifest(two / "step-00000200.json"))
        path.write_bytes(whole)
    assert _load(two)[1]["step"] == 200
    (two / object_name).write_bytes(broken)
    _falls_back(two)


def test_truncations_are_found(two):
    for name in (n for n in _names(two) if n.startswith("step-00000200")):
        whole = (two / name).read_bytes()
        for length in sorted({0, 1, len(whole) // 2, len(whole) - 1}):
            (two / name).write_bytes(whole[:length])
            with pytest.raises(checkpoint.Bad):
                checkpoint.read_object(two, checkpoint.read_manifest(two / "step-00000200.json"))
        (two / name).write_bytes(whole)
    (two / "step-00000200.json").write_bytes(b"")
    _falls_back(two, match="not JSON")
    assert "step-00000200.json.bad" in _names(two)


def test_a_missing_object_falls_back(two):
    os.unlink(two / _load(two)[1]["file"])
    _falls_back(two, match="missing")
    _save(two, 200)
    assert _load(two)[1]["step"] == 200


def test_a_missing_newest_manifest_falls_back_like_an_unfinished_save(two):
    os.unlink(two / "step-00000200.json")
    state, manifest = _load(two)
    assert manifest["step"] == 100
    _save(two, 200)
    assert len(_names(two)) == 4


def test_swapped_manifests_are_refused(two):
    a, b = two / "step-00000100.json", two / "step-00000200.json"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(NoValidCheckpoint, match="describes step"):
        _load(two)
    a.write_bytes(first)
    b.write_bytes(second)
    assert _load(two)[1]["step"] == 200  # refusing has destroyed nothing


def test_swapped_objects_fall_back_or_refuse(two):
    objects = [two / n for n in _names(two) if n.endswith(".pt")]
    shutil.copy(objects[0], objects[1])
    _falls_back(two, match="sha256")


@pytest.mark.parametrize("victims", ["objects", "manifests", "all"])
def test_all_bad_is_refused_again_and_again(two, victims):
    suffix = {"objects": ".pt", "manifests": ".json", "all": ""}[victims]
    for name in _names(two):
        if name.endswith(suffix):
            (two / name).write_bytes(b"\0" * 10)
    for _ in range(2):
        with pytest.raises(NoValidCheckpoint, match="start over"):
            _load(two)


def test_lost_manifests_are_refused(two):
    for name in _names(two):
        if name.endswith(".json"):
            os.unlink(two / name)
    with pytest.raises(NoValidCheckpoint, match="manifests are missing"):
        _load(two)


def test_only_what_was_set_aside_is_refused(two):
    (two / "step-00000200.json").write_bytes(b"x")
    _falls_back(two)
    for name in _names(two):
        if not name.endswith(".bad"):
            os.unlink(two / name)
    with pytest.raises(NoValidCheckpoint):
        _load(two)


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_other_digests_are_refused_by_name(two, name):
    with pytest.raises(ValueError, match=rf"digests.{name}: .*{DIGESTS[name]}.* other") as caught:
        load_latest(two, digests=DIGESTS | {name: "other"})
    assert not isinstance(caught.value, NoValidCheckpoint)
    assert len(_names(two)) == 4


class _Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_malicious_pickle_with_a_matching_manifest_runs_nothing(two, tmp_path, form):
    canary = tmp_path / "canary"
    manifest = checkpoint.read_manifest(two / "step-00000200.json")
    path = two / manifest["file"]
    if form == "torch":
        torch.save({"model": _Evil(canary)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": _Evil(canary)}))
    data = path.read_bytes()
    manifest |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (two / "step-00000200.json").write_bytes(manifest_bytes(manifest))
    _falls_back(two, match="more than tensors" if form == "torch" else "not an archive")
    assert not canary.exists()
    pickle.loads(pickle.dumps(_Evil(canary)))
    assert canary.exists()  # the bait works


def test_a_manifest_cannot_name_a_file_elsewhere(two, tmp_path):
    manifest = checkpoint.read_manifest(two / "step-00000200.json")
    shutil.move(two / manifest["file"], tmp_path / "outside.pt")
    manifest |= {"file": "../outside.pt"}
    (two / "step-00000200.json").write_bytes(manifest_bytes(manifest))
    _falls_back(two, match="describes")


# --- crashes and full disks ---------------------------------------------------------------------

# Saves in forked children that die by SIGKILL just before the n-th effect on the disk, for every n,
# on copies of a directory; prints how many effects a whole save has. In a process of its own
# because forking wants one that runs no threads; one process for all, because importing is slow.
CRASHING_SAVES = """
import json, os, shutil, signal, sys
from pathlib import Path
from src.storage.checkpoint import save

def save_and_die(directory, step, last):
    count = 0
    def before(function):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return counted
    pid = os.fork()
    if pid == 0:
        for name in ("open", "write", "fsync", "replace", "unlink", "rename"):
            setattr(os, name, before(getattr(os, name)))
        save(directory, {"cursor": step}, step=step, digests={"config": "c1"}, environment={})
        os._exit(count)
    status = os.waitpid(pid, 0)[1]
    return 0 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

for line in sys.stdin:
    work, base, step = json.loads(line)
    last, effects = 0, 0
    while not effects:
        last += 1
        copy = Path(work, str(last))
        shutil.copytree(base, copy)
        effects = save_and_die(copy, step, last)
    print(effects, flush=True)
"""


@pytest.fixture(scope="module")
def crash_everywhere():
    """crash_everywhere(work, base, step): copies of `base` in which a save of `step` died before
    its 1st, 2nd, ... effect; the last copy's save is whole."""
    with subprocess.Popen(
        [sys.executable, "-c", CRASHING_SAVES],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def crash(work: Path, base: Path, step: int) -> list[Path]:
            work.mkdir()
            process.stdin.write(json.dumps([str(work), str(base), step]) + "\n")
            process.stdin.flush()
            copies = [work / str(n) for n in range(1, int(process.stdout.readline()) + 2)]
            assert {p.name for p in work.iterdir()} == {p.name for p in copies}
            return copies

        yield crash
        process.stdin.close()


def _save_small(directory: Path, step: int) -> None:
    save(directory, {"cursor": step}, step=step, digests={"config": "c1"}, environment={})


@pytest.mark.parametrize("earlier", [(), (100,), (100, 200)])
def test_sigkill_before_any_effect_of_a_save_loses_only_that_save(
    tmp_path, earlier, crash_everywhere
):
    base = tmp_path / "base"
    base.mkdir()
    for step in earlier:
        _save_small(base, step)
    copies = crash_everywhere(tmp_path / "work", base, 300)
    assert len(copies) > 12  # two files of open, write, fsync, rename, and the directory's fsync
    steps = []
    for copy in copies:
        loaded = load_latest(copy, digests={"config": "c1"})  # a warning would be an error here
        steps.append(loaded[0]["cursor"] if loaded else None)
        _save_small(copy, 400)  # the next save works and sweeps up
        assert load_latest(copy, digests={"config": "c1"})[0] == {"cursor": 400}
        assert len(_names(copy)) == (2 if steps[-1] is None else 4)
    before = earlier[-1] if earlier else None
    assert steps == sorted(steps, key=lambda step: step == 300) and set(steps) == {before, 300}


def test_first_saves_may_be_killed_again_and_again(tmp_path, crash_everywhere):
    base = tmp_path / "base"
    base.mkdir()
    first = crash_everywhere(tmp_path / "first", base, 100)
    uncommitted = [c for c in first if load_latest(c, digests={"config": "c1"}) is None]
    last = max(uncommitted, key=lambda c: len(_names(c)))
    assert any(name.endswith(".pt") for name in _names(last))
    for copy in crash_everywhere(tmp_path / "second", last, 150):
        loaded = load_latest(copy, digests={"config": "c1"})
        assert loaded is None or loaded[0] == {"cursor": 150}


def test_a_save_over_the_same_step_may_be_killed(tmp_path, crash_everywhere):
    base = tmp_path / "base"
    save(base, {"cursor": "old"}, step=300, digests={"config": "c1"}, environment={})
    for copy in crash_everywhere(tmp_path / "work", base, 300):
        assert load_latest(copy, digests={"config": "c1"})[0]["cursor"] in ("old", 300)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_full_disk_at_any_phase_keeps_the_previous_checkpoint(two, monkeypatch, call):
    before = _names(two)
    real, committed = getattr(os, call), []
    for nth in range(1, 10):
        count = 0

        def full(*args, _nth=nth, **kwargs):
            nonlocal count
            count += 1
            if count == _nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, full)
        try:
            _save(two, 300)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            monkeypatch.undo()
            step = _load(two)[1]["step"]
            if step == 200:
                assert "bytes" in str(error) and str(two) in str(error)
                assert _names(two) == before
            else:
                committed.append(nth)
        else:
            monkeypatch.undo()
            break
    assert nth > 2 and _load(two)[1]["step"] == 300
    assert len(committed) <= 2  # only making the last renames durable comes after the commit


# --- generators and disk ------------------------------------------------------------------------


def test_generators_continue_where_they_were(tmp_path):
    torch.manual_seed(3)
    random.seed(3)
    random.gauss(0, 1)  # leaves a half-used pair behind
    torch.randn(3)
    save(tmp_path, {"rng": checkpoint.pack_rng()}, step=1, digests={}, environment={})
    expected = (torch.randn(4), random.random(), random.gauss(0, 1))
    torch.manual_seed(99)
    random.seed(99)
    checkpoint.restore_rng(load_latest(tmp_path, digests={})[0]["rng"])
    assert _equal((torch.randn(4), random.random(), random.gauss(0, 1)), expected)


def test_too_little_disk_is_refused_with_numbers(tmp_path, monkeypatch):
    free = 900 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    run_dir.check_disk(tmp_path / "not" / "yet", free // 4)
    with pytest.raises(OSError, match="MiB of disk are free, expected at least"):
        run_dir.check_disk(tmp_path / "not" / "yet", free // 3 + 1)
    assert not (tmp_path / "not").exists()
    _save(tmp_path / "cut", 100)  # a run that is resumed has paid for part of it already
    run_dir.check_disk(tmp_path / "cut", free // 3 + 1)
