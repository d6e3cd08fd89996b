"""How many threads a study's runs have: who decides, that it is kept, and that it is equal."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.spec.study_file import load_study
from src.storage import choices
from src.study import plan as study_plan
from src.study import runner as study
from src.study import threads as study_threads
from src.study.jobs import starter
from src.study.phases.cells import Record, Study
from src.study.threads import Places, settle
from tests.conftest import ROOT
from tests.study.test_study import SANE
from tests.study.test_study_jobs import Machine


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The shipped study on the CPU with jobs: auto, on two cores, nothing settled."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(study.cores, "available_cores", lambda: 2)
    tokens, logs = f"data.dir={tmp_path / 'tokens'}", str(tmp_path / "logs")
    found = study.load(Path("configs/study.yaml"), [tokens], logs, "cpu")
    known = replace(found.config, jobs="auto", tokens_per_s=10_000, corpus=str(tmp_path))
    return replace(found, config=known)


@pytest.mark.parametrize(
    ("asked", "cores", "gpus", "known", "expected"),
    [
        ("auto", 2, 0, None, None),  # to be measured
        ("auto", 1, 0, None, (1, 1)),
        ("auto", 8, 0, (2, "before"), (4, 2)),  # another machine: as many as fit
        ("auto", 2, 0, (4, "before"), (1, 4)),
        ("auto", 16, 4, None, (4, 4)),
        (2, 8, 0, None, (2, 4)),
        (3, 2, 0, None, (3, 1)),
        (2, 2, 0, (2, "before"), (2, 2)),
    ],
)
def test_what_is_settled_without_a_measurement(
    asked: int | str, cores: int, gpus: int, known: Any, expected: Any
) -> None:
    found = settle(asked, cores, gpus, known)
    assert (None if found is None else (found.jobs, found.threads)) == expected


def test_more_threads_than_cores_are_said() -> None:
    assert "wait for each other" in str(settle(2, 2, 0, (2, "before")))
    assert "wait for each other" not in str(settle(2, 2, 0, None))


@pytest.mark.parametrize(("side_by_side", "jobs"), [(4_500.0, 2), (3_900.0, 1)])
def test_the_faster_way_is_chosen_and_kept(
    auto: Study, monkeypatch: pytest.MonkeyPatch, side_by_side: float, jobs: int
) -> None:
    asked: list[dict[int, int]] = []

    def race(_: Study, experiment: str, threads: dict[int, int]) -> dict[int, float]:
        asked.append(threads)
        return {1: 3_840.0, 2: side_by_side}

    monkeypatch.setattr(study_threads, "race", race)
    found = [study_threads.measured(auto, "emb35", 2) for _ in range(2)]
    assert asked == [{1: 2, 2: 1}] and found[0] == found[1]
    assert (found[0].jobs, found[0].threads) == (jobs, 2 // jobs)
    assert study_threads.known_threads(auto) == (2 // jobs, "choices.json of the log directory")


def test_a_study_measures_once_and_all_its_runs_get_the_same(auto: Study) -> None:
    asked: list[str] = []

    def measure(one: Study, experiment: str, cores: int) -> Places:
        asked.append(experiment)
        choices.get(Path(one.config.log_dir), "study", lambda: {"threads": 1})
        return Places(jobs=2, threads=1, source="the test")

    machine = Machine()
    assert study.run(auto, dry_run=True, start=machine.start, measure=measure) == 0
    assert not asked and not Path(auto.config.log_dir).exists()
    assert study.run(auto, start=machine.start, measure=measure) == 0
    assert asked == ["emb35"] and max(count for _, count in machine.beside) == 2
    again = Machine()
    assert study.run(auto, start=again.start, measure=measure) == 0
    assert len(asked) == 1 and not again.beside


def test_threads_that_are_stated_or_were_used_are_not_measured(
    auto: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = replace(auto, overrides=(*auto.overrides, "training.threads=1"))
    assert study_threads.known_threads(stated) == (1, "training.threads")
    assert study_threads.known_threads(auto) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert study_threads.known_threads(auto) == (3, "OMP_NUM_THREADS")
    choices.get(Path(auto.config.log_dir), "a CPU", lambda: {"threads": 2})  # by a run before
    assert study_threads.known_threads(auto) == (2, "choices.json of the log directory")


def test_a_run_with_other_threads_is_refused(auto: Study) -> None:
    done = {"status": "finished", "dev_loss": 5.0, "device": "cpu", "threads": 2}

    def plan(threads: int, **extra: Any) -> None:
        record = Record(
            results={"emb35-rank": {**done, **extra}}, sanity=SANE, threads=threads,
            train_tokens={16_000: 2_500_000},
        )  # fmt: skip
        study_plan.plan(auto, record)

    plan(2)
    plan(1, device="cuda")
    with pytest.raises(ValueError, match="emb35-rank: found a run with threads 2, expected 1"):
        plan(1)


def test_runs_of_a_study_have_its_threads_and_no_terminal(tmp_path: Path) -> None:
    code = (
        "import json, os, sys; print(json.dumps([os.environ['OMP_NUM_THREADS'], sys.stdin.read()]))"
    )
    out = tmp_path / "out"
    line = ["/bin/sh", "-c", f'exec "$0" -S -c "$1" > {out}', sys.executable, code]
    assert starter(2, 3)(line).wait() == 0
    assert json.loads(out.read_text()) == ["3", ""]


class Timed:
    """An invented child of the race: a step takes what its threads and the clock say."""

    steps: list[int] = []

    def __init__(self, *_: Any) -> None:
        self.threads = _[-1]

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self) -> None:
        Timed.steps.append(self.threads)

    def read(self) -> dict[str, Any]:
        return {"tokens": 100}


def test_the_race_counts_all_tokens_of_a_turn(auto: Study) -> None:
    Timed.steps.clear()
    now = iter(range(1_000))
    found = study_threads.race(auto, "emb35", {1: 2, 2: 1}, Timed, lambda: float(next(now)))
    assert found == {1: 100.0, 2: 200.0}  # every turn took one second
    assert Timed.steps == [2, 1, 1] * study_threads.TURNS  # in turns


def test_a_race_of_real_processes(
    tiny_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_threads, "TURNS", 1)
    (tmp_path / "study.yaml").write_text(f"embedding: {tiny_sweep}\nglu: {tiny_sweep}\n")
    one = study.load(tmp_path / "study.yaml", (), str(tmp_path / "logs"), "cpu")
    found = study_threads.race(one, "base", {1: 1, 2: 1})
    assert set(found) == {1, 2} and min(found.values()) > 0
    assert not (tmp_path / "logs").exists()  # what the children chose is not the runs' choice
    with pytest.raises(ValueError, match="speed probe failed: .*no experiment named 'nobody'"):
        study_threads.race(one, "nobody", {1: 1})


def test_jobs_may_be_auto_or_a_number(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    for text, expected in (("auto", "auto"), ("3", 3)):
        file.write_text(f"jobs: {text}")
        assert load_study(file).jobs == expected
    for text in ("all", "0", "65", "1.5", "true"):
        file.write_text(f"jobs: {text}")
        with pytest.raises(ValueError, match="jobs: found .*expected auto, or runs at a time"):
            load_study(file)
