"""What a study's log directory holds: results, curves, checks, comparisons, time and money."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.spec import config, costs
from src.spec.kill_rule import Curve
from src.storage import documents
from src.storage.documents import Documents
from src.storage.files import read_json
from src.storage.run_dir import read_curve, read_failure, read_rows
from src.study.phases.cells import Job, Plan, Record, Study, baseline_cell
from src.study.phases.costs import Rate
from src.study.threads import probe


class Reader:
    """Reads the log directory; what is finished is read once."""

    def __init__(self, study: Study, threads: int | None = None) -> None:
        self.study, self.threads = study, threads  # of every run; None: not settled yet
        self.log_dir = Path(study.config.log_dir)
        sweep = config.sweep_from(
            study.embedding.raw, study.embedding.path, study.overrides, "rank"
        )
        self.baseline = sweep.baseline
        self.token_dir = Path(sweep.runs[0].data.dir)
        self._results: dict[str, Mapping[str, Any]] = {}
        self._beside: dict[str, Mapping[str, Any]] = {}  # cost money, and judge nothing
        self._curves: dict[str, Curve] = {}
        self._documents: dict[tuple[str, str], Documents | None] = {}

    def record(self) -> Record:
        """The log directory now."""
        failed = {}
        for path in sorted(self.log_dir.glob("*/*.json")):
            name = path.parent.name
            if path.name == "metrics.json" and name not in self._results:
                metrics = read_json(path)
                if metrics.get("phase") not in config.PHASES:  # tuned, or not a run of ours
                    self._beside[name] = metrics
                    continue
                self._results[name] = metrics
                self._curves[name] = read_curve(path.parent)
            elif path.name == "failure.json" and diverged(path.parent):
                failed[name] = {"status": "failed", "reason": read_json(path).get("message")}
        return Record(
            results={**failed, **self._results},
            curves=self._curves,
            documents=self.documents,
            train_tokens=self._train_tokens(),
            sanity=self.sanity(),
            latency=self.comparisons(),
            threads=self.threads,
        )

    def sanity(self) -> Mapping[str, Any] | None:
        """sanity.json of the baseline, None before it is there."""
        path = self.log_dir / f"{self.baseline}-sanity" / "sanity.json"
        return read_json(path) if path.is_file() else None

    def comparisons(self) -> dict[str, Mapping[str, Any]]:
        """Interleaved latencies by job name, which is their path below the log directory."""
        found = sorted((self.log_dir / "latency").glob("*.json"))
        return {path.relative_to(self.log_dir).as_posix(): read_json(path) for path in found}

    def documents(self, name: str, split: str) -> Documents | None:
        """Per-document losses of a finished run; None where it kept none."""
        key = (name, split)
        if key not in self._documents:
            self._documents[key] = documents.read(self.log_dir / name, split)
        return self._documents[key]

    def _train_tokens(self) -> dict[int, int]:
        found = {}
        for path in sorted(self.token_dir.glob("v*/meta.json")):
            meta = read_json(path)
            found[int(meta["vocab_size"])] = int(meta["splits"]["train"]["tokens"])
        return found

    # ---------------------------------------------------------------------------- time and money

    def rate(self, known: Rate | None = None) -> Rate:
        """From finished runs here, else `known`, else the study file's speed, else a probe."""
        done = [m for m in self._results.values() if m.get("train_seconds") and m.get("tokens")]
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
        cell, stated = baseline_cell(self.study), self.study.config.tokens_per_s
        if stated is not None and self.study.config.device == "cpu":
            found: dict[str, Any] = {
                "tokens_per_s": stated,
                "device": "cpu",
                "device_name": "the CPU",
            }
        else:
            found = probe(self.study, self.baseline, self.threads)
        speed = stated or found["tokens_per_s"]
        per_token = cell.flops / (cell.run.training.steps * cell.run.training.step_tokens)
        return Rate(
            flops_per_s=speed * per_token,
            overhead_s=0.0,
            usd_per_hour=costs.price_per_hour(found["device"], found["device_name"]),
            source=f"{'probed' if stated is None else 'stated'} {speed:,.0f} tokens/s of "
            f"{self.baseline} on {found['device_name']}, evaluation not counted",
        )

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
        if job.kind == "latency":
            seconds = self.comparisons().get(job.name, {}).get("wall_seconds", 0.0)
            return float(seconds) / 3600 * (rate.usd_per_hour or 0.0)
        result = self._results.get(job.name)
        if result is not None:
            return float(result.get("cost_usd") or 0.0)
        rows = read_rows(self.log_dir / job.name / "metrics.jsonl")
        elapsed = max((row.get("elapsed_s", 0.0) for row in rows), default=0.0)
        return elapsed / 3600 * (rate.usd_per_hour or 0.0)

    def runbook_spent(self) -> float:
        """Dollars of everything in the log directory, tuning and runs by hand included."""
        checks = [read_json(path) for path in sorted(self.log_dir.glob("*-sanity/sanity.json"))]
        every = (*self._results.values(), *self._beside.values(), *checks)
        return sum(float(m.get("cost_usd") or 0.0) for m in every)


def diverged(path: Path) -> bool:
    """Whether the run's failure.json says that it met a NaN: a result, unlike other failures."""
    return (read_failure(path) or {}).get("kind") == "NonFinite"
