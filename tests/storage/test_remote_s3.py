"""Remote checkpoints on a real S3 API behind a faulty proxy."""

import logging
import random
from collections.abc import Iterator

import pytest
import torch
from moto.server import ThreadedMotoServer
from pyarrow import fs

from src.storage.checkpoint import load_latest
from src.storage.remote import Remote
from src.storage.run_dir import RunDir
from tests.faulty_proxy import Proxy
from tests.storage import DIGESTS, FAST, check_store, same_files, state_of, train


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(moto_port, monkeypatch) -> Iterator[tuple[str, Proxy, fs.FileSystem, str]]:
    """(URI through the proxy, proxy, direct file system, bucket/prefix)."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    direct = fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{moto_port}", scheme="http", allow_bucket_creation=True
    )
    base = f"bucket-{random.SystemRandom().randrange(10**9)}/prefix"
    direct.create_dir(base.split("/")[0])
    proxy = Proxy(("127.0.0.1", moto_port))
    yield (
        f"s3://{base}?scheme=http&endpoint_override=127.0.0.1%3A{proxy.port}",
        proxy,
        direct,
        base,
    )
    proxy.close()


def test_s3_resume_from_the_remote_alone_is_bitwise(s3, tmp_path):
    uri, _, direct, base = s3
    with RunDir.open(tmp_path / "a", "emb35") as here:
        remote = Remote.open(uri, "emb35", local=here.path, timing=FAST)
        for step in (10, 20, 30):
            train(here, step, remote)
            assert remote.drain(30)
        assert remote.close(30) and not remote.fenced and not remote.stuck
        assert check_store(direct, f"{base}/emb35") == [20, 30]
        with RunDir.open(tmp_path / "b", "emb35") as there:
            other = Remote.open(uri, "emb35", local=there.path, timing=FAST)
            assert other.owner.generation == 2
            assert other.fetch_latest(there, digests=DIGESTS) == 30
            assert same_files(here, there, 30)
            state, manifest = load_latest(there.checkpoints, digests=DIGESTS)
            assert manifest["step"] == 30 and torch.equal(state["w"], state_of(30)["w"])
            there.truncate(state["offset"])
            train(there, 40, other)
            assert other.close(30)
    assert check_store(direct, f"{base}/emb35") == [30, 40]


@pytest.mark.parametrize("kind", ["reset", "stall", "cut"])
def test_s3_faults_never_leave_a_manifest_without_its_object(s3, tmp_path, kind):
    uri, proxy, direct, base = s3
    draw = random.Random(kind)
    with RunDir.open(tmp_path / "a", "r") as here:
        remote = Remote.open(uri, "r", local=here.path, timing=FAST)
        proxy.break_with(lambda: (kind, draw.randrange(0, 12_000)) if draw.random() < 0.6 else None)
        for step in (10, 20, 30):
            train(here, step, remote)  # training goes on at once
            remote.drain(1.0)
            check_store(direct, f"{base}/r")
        assert proxy.faults > 0
        proxy.heal()
        assert remote.drain(30)
        assert check_store(direct, f"{base}/r")[-1] == 30
        assert remote.close(30)
        with RunDir.open(tmp_path / "b", "r") as there:
            other = Remote.open(uri, "r", local=there.path, timing=FAST)
            proxy.break_with(
                lambda: (kind, draw.randrange(0, 9000)) if draw.random() < 0.3 else None
            )
            fetched = None
            while fetched is None:  # a run that exits 74 is run again
                try:
                    fetched = other.fetch_latest(there, digests=DIGESTS)
                except OSError:
                    assert load_latest(there.checkpoints, digests=DIGESTS) is None
            proxy.heal()
            assert fetched == 30 and same_files(here, there, 30)
            other.close(30)


def test_s3_a_writer_that_dies_at_any_byte_leaves_whole_checkpoints(s3, tmp_path):
    """The store sees a killed machine as connections that end: from the n-th byte on, all do."""
    uri, proxy, direct, base = s3
    for number, limit in enumerate((700, 6_000, 12_000, 18_000)):
        run_name = f"r{number}"
        with RunDir.open(tmp_path / "a", run_name) as here:
            remote = Remote.open(uri, run_name, local=here.path, timing=FAST)
            train(here, 10, remote)
            assert remote.drain(30)
            left = [limit]

            def ration(left=left):
                take = left[0]
                left[0] = max(0, left[0] - 3_500)
                return ("reset", take)

            proxy.break_with(ration)
            train(here, 20, remote)
            remote.close(0.4)
            steps = check_store(direct, f"{base}/{run_name}")
            assert steps in ([10], [10, 20])
            proxy.heal()


def test_s3_a_dead_store_neither_blocks_training_nor_the_end(s3, tmp_path):
    uri, proxy, _, _ = s3
    with RunDir.open(tmp_path / "a", "r") as here:
        remote = Remote.open(uri, "r", local=here.path, timing=FAST)
        proxy.break_with(lambda: ("stall", 0))
        for step in (10, 20, 30):
            train(here, step, remote)
        assert not remote.drain(0.2) and not remote.close(0.2)
        assert not remote.fenced
        assert remote.stuck
        proxy.break_with(lambda: ("reset", 0))
        with pytest.raises(OSError, match="s3://bucket"):
            Remote.open(uri, "r2", timing=FAST)
