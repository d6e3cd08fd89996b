"""The study: from nothing to a decision, resumable anywhere.

    python run_experiment.py --study configs/study.yaml [--dry_run]

Its only state is the log directory: each step reads it, plans (`src.study.blocks`), writes
`<log_dir>/study.json` and starts up to `jobs` commands, each a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from src.spec.command_line import OK, OUR_FAULT, TRY_AGAIN
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION
from src.spec.progress import say
from src.spec.strict_yaml import read_yaml
from src.spec.study_file import load_study
from src.storage import address
from src.storage.files import make_directory, write_atomic, write_json
from src.storage.run_dir import check_log_dir, locked
from src.study import blocks, costs, engines, speed
from src.study.plan import Configuration, Decision, Job, Plan, Source, Study
from src.study.processes import REPOSITORY, Start, Supervisor, progress_of, starter
from src.study.state import Reader, diverged, spent_beside

SCHEMA = 1
LAUNCH = "launch"  # where files for other schedulers go


def load(
    path: Path,
    overrides: Sequence[str] = (),
    log_dir: str | None = None,
    device: str | None = None,
    published: str | None = None,
) -> Study:
    """A study file and its sweeps; what the command line states wins. Raises ValueError."""
    settings = load_study(path)
    moved = device not in (None, settings.device)
    settings = dataclasses.replace(
        settings,
        tokens_per_s=None if moved else settings.tokens_per_s,  # the file's is of its own device
        log_dir=log_dir or settings.log_dir,
        device=device or settings.device,
        published=published or settings.published,
    )
    all_overrides = (*settings.overrides, *overrides)
    sources = {
        block.name: Source(Path(block.config), read_yaml(Path(block.config), "an experiment file"))
        for block in settings.blocks
        if block.config is not None
    }
    study = Study(file=str(path), config=settings, overrides=all_overrides, sources=sources)
    study.sweeps()  # refused here if one is not an experiment file
    return study


def run(
    study: Study,
    *,
    remote: str | None = None,
    dry_run: bool = False,
    engine: str = "local",
    start: Start | None = None,
    pause_s: float = 1.0,
) -> int:
    """Print the plan and what is next, then do it; returns an exit code.

    engine: local does it; slurm and sky write files for all runs that may begin now.
    start: starts a command line. pause_s: before the first rerun of what exited 75.
    0: complete. 75: stopped by a signal, or a run is to be run again. Else the worst code of a run
    that failed; the others were brought to their ends. ValueError before the budget is spent.
    """
    log_dir = Path(study.config.log_dir)
    check_log_dir(log_dir)
    if remote is not None:
        address.check(remote)
    if engine == "slurm":
        engines.check_slurm(study.config.slurm)
    if engine == "sky":
        engines.check_sky(remote)
    places = speed.places(study)
    reader = Reader(study, places.threads)
    plan = blocks.plan(study, reader.state())
    if engine != "local" and not dry_run:
        make_directory(log_dir)
        with locked(log_dir):
            reader.restore()
            if (reason := _failed_checks(plan, log_dir)) is not None:
                raise ValueError(reason)
            return _write_files(plan, engine, remote)
    rate = reader.rate(plan.state)
    print(costs.table(plan, rate, reader.spent(plan, rate), study.config.budget_usd))
    print(f"runs: {places}")
    following = [f"{job.name} ({job.stage})" for job in plan.ready()[: places.jobs]]
    print(f"next: {', '.join(following) or 'nothing'}")
    sys.stdout.flush()
    if dry_run:
        return OK
    _need_corpus(plan)
    start = start or starter(places.jobs, places.threads)
    make_directory(log_dir)
    with locked(log_dir), Supervisor(start, places.jobs, pause_s) as supervisor:
        for name in reader.restore():
            print(f"--- {name}: published before, its small files put back", flush=True)
        return _Runner(reader, rate, remote, supervisor).run()


def _failed_checks(plan: Plan, log_dir: Path) -> str | None:
    """Why nothing may be trained, where a block's sanity checks have failed."""
    for directory, checks in plan.state.sanity.items():
        if not checks["passed"]:
            return (
                f"the sanity checks failed ({checks['reason']}): see {log_dir}/{directory}/"
                "sanity.json, mend it and delete that directory (and its publication)"
            )
    return None


def _write_files(plan: Plan, engine: str, remote: str | None) -> int:
    """Files for another scheduler, of every run that may begin now; it runs, we plan again."""
    study, jobs = plan.study, plan.ready()
    if not jobs:
        print("complete" if plan.complete else "nothing can begin")
        return OK
    if jobs[0].alone:
        raise ValueError(
            f"{study.file}: next is {jobs[0].name}, which is no run: start this command once "
            "without --engine, here"
        )
    for job in jobs:
        _write_sweep(plan, job)
    runs = [(job, run_arguments(study, job, remote)) for job in jobs]
    name, directory = Path(study.file).stem, Path(LAUNCH)
    if engine == "slurm":
        script = engines.slurm(study.config.slurm, runs, name, directory)
        print(
            f"wrote {script}, {len(runs)} runs; submit it with: sbatch {shlex.quote(str(script))}"
        )
    else:
        for path in engines.sky(study.config.sky, runs, name, directory, plan.sweeps):
            print(f"wrote {path}; start it with: sky jobs launch --yes --detach-run {path}")
    print("run the same command again when they have ended: it writes what comes next")
    return OK


class _Runner:
    """Plan, write study.json, keep up to `jobs` commands running; until nothing is left that may
    begin, the money would be spent, or a signal comes."""

    def __init__(
        self, reader: Reader, rate: costs.Rate, remote: str | None, supervisor: Supervisor
    ) -> None:
        self.reader, self.study, self.log_dir = reader, reader.study, reader.log_dir
        self.rate, self.remote, self.supervisor = rate, remote, supervisor
        self.begun: dict[str, Job] = {}  # ended with 0, or still run
        self.failed: dict[str, int] = {}  # ended for good with another code
        self.printed = -1  # steps done when progress was last printed

    def run(self) -> int:
        """Returns the study's exit code; the supervisor's context stops what still runs then."""
        while True:
            plan = blocks.plan(self.study, self.reader.state())
            self.rate = self.reader.rate(plan.state, self.rate)
            by_stage = self.reader.spent(plan, self.rate)
            spent = sum(by_stage.values())
            self._print_progress(plan, spent)
            write_json(self.log_dir / "study.json", summary(plan, by_stage))
            if (reason := _failed_checks(plan, self.log_dir)) is not None:
                print(reason, file=sys.stderr)
                return OUR_FAULT
            unaffordable = self._start_ready(plan, spent)
            if not self.supervisor.names or self.supervisor.stopped:
                return self._end(plan, spent, unaffordable)
            if (ended := self.supervisor.first_ended()) is None:
                return TRY_AGAIN
            name, code = ended
            if code != OK and not diverged(self.log_dir / name):
                say(name, f"failed: exit code {code}")
                self.failed[name] = code

    def _start_ready(self, plan: Plan, spent: float) -> Job | None:
        """Start what may begin; returns the first job that the budget does not allow."""
        for job in plan.ready(self.supervisor.names, self.failed):
            if not self.supervisor.has_room:
                break
            # What runs counts with its whole estimate, and once more with what it has used.
            running = [self.begun[name] for name in self.supervisor.names]
            promised = sum(costs.dollars(other, self.rate) for other in running)
            if spent + promised + costs.dollars(job, self.rate) > self.study.config.budget_usd:
                return job
            _write_sweep(plan, job)
            if job.name in self.begun:
                raise RuntimeError(
                    f"{job.name}: its command ended with 0 and left no result that the study can "
                    f"read in {self.log_dir}, so it would be started for ever"
                )
            self.begun[job.name] = job
            print(f"--- {job.stage}: {job.name}", flush=True)
            line = command(self.study, job, self.remote)
            self.supervisor.add(job.name, line, partial(progress_of, self.log_dir / job.name))
        return None

    def _print_progress(self, plan: Plan, spent: float) -> None:
        done = sum(not job.open for job in plan.jobs)
        if done != self.printed:
            self.printed = done
            hours = sum(costs.seconds(job, self.rate) for job in plan.jobs) / 3600
            print(
                f"--- {done} of {len(plan.jobs)} steps done, {spent:.2f} USD spent, about "
                f"{hours:.2f} hours of runs to go",
                flush=True,
            )

    def _end(self, plan: Plan, spent: float, unaffordable: Job | None) -> int:
        """Nothing runs and nothing can begin: why, and the exit code."""
        if self.supervisor.stopped or TRY_AGAIN in self.failed.values():
            return TRY_AGAIN
        if self.failed:
            return max(self.failed.values())
        if unaffordable is not None:
            cost, budget = costs.dollars(unaffordable, self.rate), self.study.config.budget_usd
            raise ValueError(
                f"stopped before {unaffordable.name}: {spent:.2f} USD are spent and it would take "
                f"about {cost:.2f}, but budget_usd in {self.study.file} is {budget:g}; raise it "
                "and run the same command to go on"
            )
        assert plan.complete, "nothing runs, nothing can begin and something is open"
        for decision in plan.decisions:
            print(f"{decision['phase']:>3} {decision['rule']}: {decision['verdict']}")
        print(f"complete; {spent:.2f} USD")
        return OK


def command(study: Study, job: Job, remote: str | None = None) -> list[str]:
    """The command line of one job: what an intern would type."""
    settings = study.config
    if job.kind == "tokens":
        script = str(REPOSITORY / "scripts" / "preprocess_lm.py")
        return [sys.executable, script, "--input", str(settings.corpus), "--vocab_size",
                str(job.run.model.vocab_size), "--output", str(Path(job.name).parent)]  # fmt: skip
    if job.kind == "latency":
        return [sys.executable, "-m", "src.evaluation.latency", *job.arguments, "--device",
                settings.device, "--output", str(Path(settings.log_dir, job.name))]  # fmt: skip
    script = str(REPOSITORY / "run_experiment.py")
    return [sys.executable, script, *run_arguments(study, job, remote)]


def run_arguments(study: Study, job: Job, remote: str | None = None) -> list[str]:
    """What run_experiment.py is given for a run or a check."""
    settings, run, configuration = study.config, job.run, job.configuration
    line = ["--config", str(configuration.path), "--exp", run.experiment, "--phase"]
    line += ["sanity"] if job.kind == "sanity" else [run.phase, "--seed", str(run.seed)]
    line += ["--log_dir", str(Path(settings.log_dir, configuration.folder))]
    line += ["--device", settings.device]
    for override in (*study.overrides, *configuration.overrides):
        line += ["--set", override]
    return line if remote is None else [*line, "--remote", remote]


def _write_sweep(plan: Plan, job: Job) -> None:
    """The job's sweep file, where the study has made it."""
    path = job.configuration.path
    if path in plan.sweeps:
        make_directory(path.parent)
        text = yaml.safe_dump(json.loads(json.dumps(plan.sweeps[path])), sort_keys=False)
        write_atomic(path, f"# Made by the study; do not edit.\n{text}".encode())


def _need_corpus(plan: Plan) -> None:
    missing = [job.name for job in plan.jobs if job.kind == "tokens"]
    if missing and plan.study.config.corpus is None:
        raise ValueError(
            f"{plan.study.file}: corpus: found null, expected the corpus directory from which the "
            f"missing tokens {', '.join(missing)} can be made (or make them with "
            "scripts/preprocess_lm.py)"
        )


# --------------------------------------------------------------------------------------- study.json


def summary(plan: Plan, spent: Mapping[str, float]) -> dict[str, Any]:
    """study.json: decisions, aliases, runs and costs. No clocks, no paths of this machine."""
    settings, total = plan.study.config, sum(spent.values())
    runbook = total + spent_beside(plan)
    stages = "; ".join(f"{stage}: {usd:.4f} USD" for stage, usd in spent.items())
    return {
        "schema": SCHEMA,
        "study": Path(plan.study.file).name,
        "complete": plan.complete,
        "winner": plan.winner,
        "decisions": [
            *plan.decisions,
            _cost_decision("study", total, settings.budget_usd, stages),
            _cost_decision("whole runbook", runbook, settings.runbook_budget_usd,
                           "every run of the log directory"),
        ],
        "sweeps": sorted({job.configuration.path.name for job in plan.jobs}),
        "aliases": [_alias(job.configuration, job.alias_of) for job in plan.jobs if job.alias_of],
        "runs": [
            {
                "stage": job.stage,
                "run": job.name,
                "kind": job.kind,
                "n_layers": job.configuration.allocation.model.n_layers,
                "state": "alias" if job.alias_of else "done" if job.done
                else "assumed" if job.assumed else "to do",
            }
            for job in plan.jobs
            if job.kind != "tokens"
        ],
        "costs": {
            "stages_usd": dict(spent),
            "total_usd": total,
            "budget_usd": settings.budget_usd,
            "runbook_usd": runbook,
            "runbook_budget_usd": settings.runbook_budget_usd,
        },
    }  # fmt: skip


def _alias(configuration: Configuration, original: str) -> dict[str, Any]:
    """The keys of metrics.json by which it differs from the run that stands for it."""
    run = configuration.run
    return {
        "run": configuration.name,
        "alias_of": original,
        "experiment": run.experiment,
        "sweep": configuration.path.name,
        "baseline": configuration.is_baseline,
        "baseline_name": run.baseline,
        EMBEDDING_RATIO.asked: run.model.embedding_ratio,
        GLU_EXPANSION.asked: run.model.glu_expansion,
    }


def _cost_decision(what: str, usd: float, limit: float, numbers: str) -> Decision:
    return {
        "phase": "all",
        "rule": f"cost of the {what}",
        "numbers": numbers,
        "verdict": f"{usd:.4f} USD, {'within' if usd <= limit else 'above'} {limit:g}",
        "reason": "wall seconds at the prices of configs/prices.yaml",
    }
