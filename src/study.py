"""The study: phases 0, 1, 1b and 2 in order, from nothing to a decision, resumable anywhere.

    python run_experiment.py --study configs/study.yaml [--dry_run]

Its only state is the run directories: each step reads them, asks `src.study_plan` what is next,
writes `<log_dir>/study.json` and starts one `run_experiment.py` of its own process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from src import config, costs, study_plan
from src.command_line import BAD_INPUT, OK, OUR_FAULT, TRY_AGAIN
from src.kill_rule import Curve
from src.run_dir import locked, read_rows, write_atomic, write_json
from src.study_plan import Documents, Job, Plan, Rate, Record, Source, Study

SCHEMA = 1
REPOSITORY = Path(__file__).resolve().parents[1]

Execute = Callable[[Sequence[str]], int]


def load(
    path: Path, overrides: Sequence[str] = (), log_dir: str | None = None, device: str | None = None
) -> Study:
    """A study file and its sweeps; what the command line states wins. Raises ValueError."""
    asked = config.load_study(path)
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
    return Source(path, config.read_yaml(path, "an experiment file"))


def run(
    study: Study,
    *,
    remote: str | None = None,
    dry_run: bool = False,
    execute: Execute | None = None,
) -> int:
    """Print the plan, then do it; returns an exit code (75: run me again, 78: the budget is spent).

    execute: starts a command line and returns its exit code; by default a process of its own.
    """
    log_dir = Path(study.config.log_dir)
    reader = _Reader(study)
    found = study_plan.plan(study, reader.record())
    rate = reader.rate()
    print(study_plan.table(found, rate, reader.spent(found, rate), study.config.budget_usd))
    if dry_run:
        return OK
    _need_corpus(study, found)
    log_dir.mkdir(parents=True, exist_ok=True)
    with locked(log_dir):
        return _conduct(study, reader, rate, remote, execute or _process)


def _conduct(
    study: Study, reader: _Reader, rate: Rate, remote: str | None, execute: Execute
) -> int:
    """Plan, write study.json, do the next job; until nothing is left or the money would be."""
    while True:
        record = reader.record()
        found = study_plan.plan(study, record)
        rate = reader.rate(rate)
        spent = reader.spent(found, rate)
        write_json(Path(study.config.log_dir) / "study.json", summary(study, found, reader, spent))
        if record.sanity is not None and not record.sanity["passed"]:
            return _say(
                f"the sanity checks failed ({record.sanity['reason']}): see "
                f"{study.config.log_dir}/*-sanity/sanity.json, mend it and delete that directory",
                OUR_FAULT,
            )
        job = found.next
        if job is None:
            _tell_end(found, spent)
            return OK
        needs = study_plan.dollars(job, rate)
        if sum(spent.values()) + needs > study.config.budget_usd:
            return _say(
                f"stopped before {job.name}: {sum(spent.values()):.2f} USD are spent and it would "
                f"take about {needs:.2f}, but budget_usd in {study.file} is "
                f"{study.config.budget_usd:g}; raise it and run the same command to go on",
                BAD_INPUT,
            )
        for path, content in found.sweeps.items():
            if path == job.path:
                _write_sweep(path, content)
        print(f"--- {job.stage}: {job.name}", flush=True)
        code = execute(command(study, job, remote))
        if code != OK and not _diverged(Path(study.config.log_dir) / job.name):
            return code


def command(study: Study, job: Job, remote: str | None = None) -> list[str]:
    """The command line of one job: what an intern would type."""
    asked = study.config
    if job.kind == "tokens":
        script = str(REPOSITORY / "scripts" / "preprocess_lm.py")
        output = str(Path(job.name).parent)
        return [sys.executable, script, "--input", str(asked.corpus), "--vocab_size",
                str(job.vocab_size), "--output", output]  # fmt: skip
    phase = "sanity" if job.kind == "sanity" else job.phase
    line = [sys.executable, str(REPOSITORY / "run_experiment.py"), "--config", str(job.path),
            "--exp", job.experiment, "--phase", phase, "--seed", str(job.seed),
            "--log_dir", asked.log_dir, "--device", asked.device]  # fmt: skip
    for override in study.overrides:
        line += ["--set", override]
    return line if remote is None else [*line, "--remote", remote]


def _process(line: Sequence[str]) -> int:
    """Run a command line; a signal that ends us ends it too, and waits for its checkpoint."""
    with subprocess.Popen(line) as child:
        try:
            code = child.wait()
        except BaseException:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise
    return TRY_AGAIN if code < 0 else code  # ended by a signal: resumable


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


def _diverged(path: Path) -> bool:
    """Whether the run's failure.json says that it met a NaN: a result, unlike other failures."""
    try:
        return json.loads((path / "failure.json").read_bytes()).get("kind") == "NonFinite"
    except FileNotFoundError:
        return False


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


def _tell_end(found: Plan, spent: Mapping[str, float]) -> None:
    for decision in found.decisions:
        print(f"{decision['phase']:>3} {decision['rule']}: {decision['verdict']}")
    print(f"complete; {sum(spent.values()):.2f} USD")


# ------------------------------------------------------------------------- reading run directories


class _Reader:
    """Reads the log directory; what is finished is read once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.log_dir = Path(study.config.log_dir)
        sweep = config.sweep_from(
            study.embedding.raw, study.embedding.path, study.overrides, "rank"
        )
        self.baseline = sweep.baseline
        self.token_dir = Path(sweep.runs[0].data.dir)
        self._results: dict[str, Mapping[str, Any]] = {}
        self._curves: dict[str, Curve] = {}
        self._documents: dict[tuple[str, str], Documents | None] = {}

    def record(self) -> Record:
        """The log directory now."""
        failed = {}
        for path in sorted(self.log_dir.glob("*/*.json")):
            name = path.parent.name
            if path.name == "metrics.json" and name not in self._results:
                self._results[name] = _read_json(path)
                rows = read_rows(path.parent / "metrics.jsonl", "dev")
                self._curves[name] = [(row["tokens"], row["dev_perplexity"]) for row in rows]
            elif path.name == "failure.json" and _diverged(path.parent):
                failed[name] = {"status": "failed", "reason": _read_json(path).get("message")}
        return Record(
            results={**failed, **self._results},
            curves=self._curves,
            documents=self.documents,
            train_tokens=self._train_tokens(),
            sanity=self.sanity(),
        )

    def sanity(self) -> Mapping[str, Any] | None:
        path = self.log_dir / f"{self.baseline}-sanity" / "sanity.json"
        return _read_json(path) if path.is_file() else None

    def documents(self, name: str, split: str) -> Documents | None:
        """Per-document losses of a finished run; None where it kept none."""
        key = (name, split)
        if key not in self._documents:
            path = self.log_dir / name / f"documents_{split}.npz"
            self._documents[key] = None
            if path.is_file():
                with np.load(path) as arrays:
                    self._documents[key] = Documents(
                        nats=arrays["document_nats"].astype(np.float64),
                        tokens=arrays["document_tokens"],
                        bytes=arrays["document_bytes"],
                    )
        return self._documents[key]

    def _train_tokens(self) -> dict[int, int]:
        found = {}
        for path in sorted(self.token_dir.glob("v*/meta.json")):
            meta = _read_json(path)
            found[int(meta["vocab_size"])] = int(meta["splits"]["train"]["tokens"])
        return found

    # ---------------------------------------------------------------------------- time and money

    def rate(self, known: Rate | None = None) -> Rate:
        """From finished runs here, else `known`, else the study file's speed, else a probe."""
        done = [
            m
            for m in self._results.values()
            if m.get("phase") in config.PHASES and m.get("train_seconds") and m.get("tokens")
        ]
        if done:
            last = done[-1]
            return Rate(
                flops_per_s=sum(m["flops_per_token"] * m["tokens"] for m in done)
                / sum(m["train_seconds"] for m in done),
                overhead_s=statistics.fmean(m["wall_seconds"] - m["train_seconds"] for m in done),
                usd_per_hour=costs.price_per_hour(last["device"], last["device_name"]),
                source=f"measured on {len(done)} runs of {self.log_dir}",
            )
        return known or self._probed()

    def _probed(self) -> Rate:
        """The stated speed, or a probe's; a probe also says which device is to be paid for."""
        cell, stated = study_plan.baseline_cell(self.study), self.study.config.tokens_per_s
        if stated is not None and self.study.config.device == "cpu":
            found: dict[str, Any] = {
                "tokens_per_s": stated,
                "device": "cpu",
                "device_name": "the CPU",
            }
        else:
            found = self._probe()
        speed = stated or found["tokens_per_s"]
        per_token = cell.flops / (cell.run.training.steps * cell.run.training.step_tokens)
        return Rate(
            flops_per_s=speed * per_token,
            overhead_s=0.0,
            usd_per_hour=costs.price_per_hour(found["device"], found["device_name"]),
            source=f"{'probed' if stated is None else 'stated'} {speed:,.0f} tokens/s of "
            f"{self.baseline} on {found['device_name']}, evaluation not counted",
        )

    def _probe(self) -> dict[str, Any]:
        """A few training steps in a process of its own, which leaves no torch in this one."""
        line = [sys.executable, "-m", "src.sanity", "--config", str(self.study.embedding.path),
                "--exp", self.baseline, "--device", self.study.config.device,
                "--log_dir", str(self.log_dir)]  # fmt: skip
        for override in self.study.overrides:
            line += ["--set", override]
        path = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # wherever the study was started
        done = subprocess.run(line, capture_output=True, text=True, env=path, check=False)
        if done.returncode:
            told = done.stderr.strip().splitlines()
            raise ValueError(
                f"{self.study.file}: device {self.study.config.device}: the speed probe failed: "
                f"{told[-1] if told else 'no message'}"
            )
        return json.loads(done.stdout.splitlines()[-1])

    def spent(self, found: Plan, rate: Rate) -> dict[str, float]:
        """Dollars by stage: finished runs, the checks, and what unfinished runs have used."""
        totals: dict[str, float] = {}
        for job in found.jobs:
            cost = 0.0 if job.alias_of else self._cost(job, rate)
            totals[job.stage] = totals.get(job.stage, 0.0) + cost
        return totals

    def _cost(self, job: Job, rate: Rate) -> float:
        if job.kind == "sanity":
            checks = self.sanity()
            return float((checks or {}).get("cost_usd") or 0.0)
        result = self._results.get(job.name)
        if result is not None:
            return float(result.get("cost_usd") or 0.0)
        rows = read_rows(self.log_dir / job.name / "metrics.jsonl")
        elapsed = max((row.get("elapsed_s", 0.0) for row in rows), default=0.0)
        return elapsed / 3600 * (rate.usd_per_hour or 0.0)

    def runbook_spent(self) -> float:
        """Dollars of everything in the log directory, tuning and runs by hand included."""
        checks = [_read_json(path) for path in sorted(self.log_dir.glob("*-sanity/sanity.json"))]
        return sum(float(m.get("cost_usd") or 0.0) for m in (*self._results.values(), *checks))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: found no JSON ({error}); delete it to go on") from None


# --------------------------------------------------------------------------------------- study.json


def summary(
    study: Study, found: Plan, reader: _Reader, spent: Mapping[str, float]
) -> dict[str, Any]:
    """study.json: decisions, aliases, runs and costs. No clocks, no paths of this machine."""
    asked, total, runbook = study.config, sum(spent.values()), reader.runbook_spent()
    return {
        "schema": SCHEMA,
        "study": Path(study.file).name,
        "complete": found.complete,
        "decisions": [*found.decisions, *_cost_decisions(study, spent, total, runbook)],
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
) -> list[study_plan.Decision]:
    rows: list[study_plan.Decision] = []
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
