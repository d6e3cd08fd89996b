"""The study: phases 0, 1, 1b and 2 in order, from nothing to a decision, resumable anywhere.

    python run_experiment.py --study configs/study.yaml [--dry_run]

Its only state is the log directory: each step reads it, asks `src.study.plan` what may begin,
writes `<log_dir>/study.json` and starts up to `jobs` commands, each a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from src.compute import cores
from src.spec import config
from src.spec.command_line import BAD_INPUT, OK, OUR_FAULT, TRY_AGAIN
from src.spec.strict_yaml import read_yaml
from src.spec.study_file import load_study
from src.storage import address
from src.storage.run_dir import check_log_dir, locked, write_atomic, write_json
from src.study import plan as study_plan
from src.study.jobs import REPOSITORY, Holder, Running, Start, is_held, starter
from src.study.phases import costs
from src.study.phases.cells import Decision, Job, Plan, Source, Study
from src.study.state import Reader, diverged
from src.study.threads import Places, gpus, known_threads, measured, settle

SCHEMA = 1


def load(
    path: Path, overrides: Sequence[str] = (), log_dir: str | None = None, device: str | None = None
) -> Study:
    """A study file and its sweeps; what the command line states wins. Raises ValueError."""
    asked = load_study(path)
    asked = dataclasses.replace(
        asked, log_dir=log_dir or asked.log_dir, device=device or asked.device
    )
    sources: dict[str, Source | None] = {}
    for key in ("embedding", "glu", "vocabulary"):
        named = getattr(asked, key)
        every = (*asked.overrides, *overrides)
        sources[key] = _source(Path(named), every) if named is not None else None
    embedding, glu = sources["embedding"], sources["glu"]
    assert embedding is not None and glu is not None
    return Study(
        file=str(path),
        config=asked,
        overrides=(*asked.overrides, *overrides),
        embedding=embedding,
        glu=glu,
        vocabulary=sources["vocabulary"],
    )


def _source(path: Path, overrides: Sequence[str]) -> Source:
    sweep = config.load_sweep(path, overrides)  # refused here if it is not an experiment file
    if sweep.rates:
        raise ValueError(
            f"{path}: training.learning_rate: found a list of rates, expected one: a study ranks "
            "shapes; run the list by itself with --config, then state the rate it points to"
        )
    return Source(path, read_yaml(path, "an experiment file"))


def run(
    study: Study,
    *,
    remote: str | None = None,
    dry_run: bool = False,
    start: Start | None = None,
    measure: Callable[[Study, str, int], Places] = measured,
) -> int:
    """Print the plan, then do it; returns an exit code (75: run me again, 78: the budget is spent).

    start: starts a command line; by default as a process that ends with this one. measure: how
    `jobs: auto` finds out what nothing else settles.
    """
    log_dir, count = Path(study.config.log_dir), cores.available_cores()
    check_log_dir(log_dir)
    if remote is not None:
        address.check(remote)
    known = known_threads(study)
    places = settle(study.config.jobs, count, gpus(study.config.device), known)
    reader = Reader(study, None if places is None else places.threads)
    found = study_plan.plan(study, reader.record())
    rate = reader.rate()
    print(costs.table(found, rate, reader.spent(found, rate), study.config.budget_usd))
    print(f"runs: {places or 'jobs: auto is measured when the study begins'}", flush=True)
    if dry_run:
        return OK
    _need_corpus(study, found)
    log_dir.mkdir(parents=True, exist_ok=True)
    with locked(log_dir):
        if places is None:
            places = measure(study, reader.baseline, count)
            reader.threads = places.threads
            print(f"runs: {places}", flush=True)
        start = start or starter(places.jobs, places.threads)
        conductor = _Conductor(study, reader, rate, remote, start, places.jobs)
        try:
            return conductor.conduct()
        finally:
            conductor.running.stop()


class _Conductor:
    """Plan, write study.json, keep up to `jobs` jobs running; until nothing is left, the money
    would be spent, or a job fails."""

    def __init__(
        self,
        study: Study,
        reader: Reader,
        rate: costs.Rate,
        remote: str | None,
        start: Start,
        jobs: int,
    ) -> None:
        self.study, self.reader, self.rate = study, reader, rate
        self.remote, self.start, self.jobs = remote, start, jobs
        self.log_dir = Path(study.config.log_dir)
        self.running = Running()
        self.begun: set[str] = set()  # jobs of ours that ended with 0, or still run
        self.told = -1  # steps done when progress was last printed

    def conduct(self) -> int:
        """Returns the study's exit code; what still runs then is for the caller to stop."""
        while True:
            record = self.reader.record()
            found = study_plan.plan(self.study, record)
            self.rate = self.reader.rate(self.rate)
            spent = self.reader.spent(found, self.rate)
            self._tell_progress(found, sum(spent.values()))
            content = summary(self.study, found, self.reader, spent)
            write_json(self.log_dir / "study.json", content)
            if record.sanity is not None and not record.sanity["passed"]:
                return _say(
                    f"the sanity checks failed ({record.sanity['reason']}): see "
                    f"{self.log_dir}/*-sanity/sanity.json, mend it and delete that directory",
                    OUR_FAULT,
                )
            too_dear = self._start_ready(found, sum(spent.values()))
            if not self.running:
                if too_dear is not None:
                    return self._say_too_dear(too_dear, sum(spent.values()))
                assert found.complete, "nothing runs, nothing can begin and something is open"
                _tell_end(found, spent)
                return OK
            job, code = self.running.first_ended()
            if code != OK:
                self.begun.discard(job.name)
            if code == TRY_AGAIN and self._is_held(job):
                self._wait_for(job)
            elif code != OK and not diverged(self.log_dir / job.name):
                return code

    def _start_ready(self, found: Plan, spent: float) -> Job | None:
        """Start what may begin; returns the first job that the budget does not allow."""
        for job in found.ready(self.running.names):
            if len(self.running) >= self.jobs:
                break
            # What runs counts with its whole estimate, and once more with what it has used.
            promised = sum(costs.dollars(other, self.rate) for other in self.running.jobs)
            needs = costs.dollars(job, self.rate)
            if spent + promised + needs > self.study.config.budget_usd:
                return job
            if self._is_held(job):
                self._wait_for(job)
                continue
            if job.path in found.sweeps:
                _write_sweep(job.path, found.sweeps[job.path])
            if job.name in self.begun:
                raise RuntimeError(
                    f"{job.name}: its command ended with 0 and left no result that the study can "
                    f"read in {self.log_dir}, so it would be started for ever"
                )
            self.begun.add(job.name)
            print(f"--- {job.stage}: {job.name}", flush=True)
            self.running.add(job, self.start(command(self.study, job, self.remote)))
        return None

    def _tell_progress(self, found: Plan, spent: float) -> None:
        done = sum(not job.open for job in found.jobs)
        if done != self.told:
            self.told = done
            hours = sum(costs.seconds(job, self.rate) for job in found.jobs) / 3600
            print(
                f"--- {done} of {len(found.jobs)} steps done, {spent:.2f} USD spent, about "
                f"{hours:.2f} hours of runs to go",
                flush=True,
            )

    def _is_held(self, job: Job) -> bool:
        return job.kind in ("train", "sanity") and is_held(self.log_dir / job.name)

    def _wait_for(self, job: Job) -> None:
        """A run that somebody else is at, such as what a killed study left behind, is theirs."""
        print(f"--- {job.stage}: {job.name} is held by another process, waiting", flush=True)
        self.running.add(job, Holder(self.log_dir / job.name))

    def _say_too_dear(self, job: Job, spent: float) -> int:
        return _say(
            f"stopped before {job.name}: {spent:.2f} USD are spent and it would take about "
            f"{costs.dollars(job, self.rate):.2f}, but budget_usd in {self.study.file} is "
            f"{self.study.config.budget_usd:g}; raise it and run the same command to go on",
            BAD_INPUT,
        )


def command(study: Study, job: Job, remote: str | None = None) -> list[str]:
    """The command line of one job: what an intern would type."""
    asked = study.config
    if job.kind == "tokens":
        script = str(REPOSITORY / "scripts" / "preprocess_lm.py")
        output = str(Path(job.name).parent)
        return [sys.executable, script, "--input", str(asked.corpus), "--vocab_size",
                str(job.vocab_size), "--output", output]  # fmt: skip
    if job.kind == "latency":
        ours, _, theirs = Path(job.name).stem.partition("-against-")
        runs = [str(Path(asked.log_dir) / name) for name in (theirs, ours)]
        return [sys.executable, "-m", "src.evaluation.latency", "--compare", *runs, "--device",
                asked.device, "--output", str(Path(asked.log_dir) / job.name),
                *job.arguments]  # fmt: skip
    phase = "sanity" if job.kind == "sanity" else job.phase
    line = [sys.executable, str(REPOSITORY / "run_experiment.py"), "--config", str(job.path),
            "--exp", job.experiment, "--phase", phase, "--seed", str(job.seed),
            "--log_dir", asked.log_dir, "--device", asked.device]  # fmt: skip
    for override in study.overrides:
        line += ["--set", override]
    return line if remote is None else [*line, "--remote", remote]


def _write_sweep(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False)
    write_atomic(path, f"# Made by the study; do not edit.\n{text}".encode())


def _need_corpus(study: Study, found: Plan) -> None:
    missing = [job.name for job in found.jobs if job.kind == "tokens" and not job.done]
    if missing and study.config.corpus is None:
        raise ValueError(
            f"{study.file}: corpus: found null, expected the corpus directory from which the "
            f"missing tokens {', '.join(missing)} can be made (or make them with "
            "scripts/preprocess_lm.py)"
        )


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


def _tell_end(found: Plan, spent: Mapping[str, float]) -> None:
    for decision in found.decisions:
        print(f"{decision['phase']:>3} {decision['rule']}: {decision['verdict']}")
    print(f"complete; {sum(spent.values()):.2f} USD")


# --------------------------------------------------------------------------------------- study.json


def summary(
    study: Study, found: Plan, reader: Reader, spent: Mapping[str, float]
) -> dict[str, Any]:
    """study.json: decisions, aliases, runs and costs. No clocks, no paths of this machine."""
    asked, total, runbook = study.config, sum(spent.values()), reader.runbook_spent()
    return {
        "schema": SCHEMA,
        "study": Path(study.file).name,
        "complete": found.complete,
        "winner": found.winner,
        "decisions": [*found.decisions, *_cost_decisions(study, spent, total, runbook)],
        "sweeps": sorted({job.path.name for job in found.jobs}),
        "aliases": [dict(alias) for alias in found.aliased],
        "runs": [
            {
                "stage": job.stage,
                "run": job.name,
                "kind": job.kind,
                "n_layers": job.n_layers,
                "state": "alias" if job.alias_of else "done" if job.done
                else "assumed" if job.assumed else "to do",
            }
            for job in found.jobs
            if job.kind != "tokens"
        ],
        "costs": {
            "stages_usd": dict(spent),
            "total_usd": total,
            "budget_usd": asked.budget_usd,
            "runbook_usd": runbook,
            "runbook_budget_usd": asked.runbook_budget_usd,
        },
    }  # fmt: skip


def _cost_decisions(
    study: Study, spent: Mapping[str, float], total: float, runbook: float
) -> list[Decision]:
    rows: list[Decision] = []
    stages = "; ".join(f"{stage}: {usd:.4f} USD" for stage, usd in spent.items())
    for rule, value, limit, numbers in (
        ("cost of the study", total, study.config.budget_usd, stages),
        ("cost of the whole runbook", runbook, study.config.runbook_budget_usd,
         "every run of the log directory"),
    ):  # fmt: skip
        verdict = "within" if value <= limit else "above"
        rows.append(
            {
                "phase": "all",
                "rule": rule,
                "numbers": numbers,
                "verdict": f"{value:.4f} USD, {verdict} {limit:g}",
                "reason": "wall seconds at the prices of configs/prices.yaml",
            }
        )
    return rows
