"""What a study's log directory holds: results, curves, checks, comparisons, time and money.

A run that was published counts wherever its log directory went: `restore` puts its small files
back, which make a finished run.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from src.spec import config, costs
from src.spec.kill_rule import Curve
from src.storage import documents
from src.storage.documents import Documents
from src.storage.files import read_json, write_atomic
from src.storage.run_dir import read_curve, read_failure, read_rows
from src.study import speed
from src.study.costs import Rate
from src.study.plan import Job, Plan, State, Study


class Reader:
    """Reads the log directory, and the publication where it has no run."""

    def __init__(self, study: Study, threads: int | None = None) -> None:
        self.study, self.threads = study, threads  # of every run; None: not settled yet
        self.log_dir, published = Path(study.config.log_dir), study.config.published
        self.published = None if published is None else Path(published)
        self.baseline = study.baseline()
        self._folders = sorted({"", *(block.folder for block in study.config.blocks)})

    def state(self) -> State:
        """The log directory now."""
        files = {
            name: path
            for path, name in self._files("*/metrics.json", published="runs")
            if path.parent == self.log_dir / name or not _begun(self.log_dir / name)
        }
        metrics = {name: read_json(path) for name, path in files.items()}
        # What was tuned, or is not a run of ours, costs money and judges nothing.
        runs = {name: m for name, m in metrics.items() if m.get("phase") in config.PHASES}
        failed = {
            name: {"status": "failed", "reason": read_json(path).get("message")}
            for path, name in self._files("*/failure.json")
            if diverged(path.parent)
        }
        return State(
            results={**failed, **runs},
            others={name: m for name, m in metrics.items() if name not in runs},
            curves={name: _curve(files[name].parent, m) for name, m in runs.items()},
            documents=self.documents,
            train_tokens=self._train_tokens(),
            sanity={name: read_json(path)
                    for path, name in self._files("*-sanity/sanity.json")},
            latency={f"{name}/{path.name}": read_json(path)
                     for path, name in self._files("latency/*.json")},
            threads=self.threads,
        )  # fmt: skip

    def _files(self, pattern: str, published: str = "") -> Iterable[tuple[Path, str]]:
        """Files and the names of their directories below the log directory, whose own come first,
        or below `published` of the publication."""
        roots = [self.log_dir] + ([] if self.published is None else [self.published / published])
        files: dict[Path, Path] = {}
        for root in roots:
            for folder in self._folders:
                for path in sorted((root / folder).glob(pattern)):
                    files.setdefault(path.relative_to(root), path)
        return [(path, relative.parent.as_posix()) for relative, path in files.items()]

    def restore(self) -> list[str]:
        """Put published runs into the log directory where they were not begun; their names."""
        if self.published is None:
            return []
        bundle = self.published / "results_bundle.json"
        configs = read_json(bundle).get("runs", {}) if bundle.is_file() else {}
        restored = []
        for path in sorted((self.published / "runs").rglob("metrics.json")):
            name = path.parent.relative_to(self.published / "runs").as_posix()
            place = self.log_dir / name
            if not ((place / "metrics.json").exists() or _begun(place)):
                _restore(path.parent, place, configs.get(name))
                restored.append(name)
        for path in sorted(self.published.rglob("sanity.json")):
            place = self.log_dir / path.parent.relative_to(self.published)
            if not place.exists():
                shutil.copytree(path.parent, place)
        return restored

    def documents(self, name: str, split: str) -> Documents | None:
        """Per-document losses of a finished run; None where it kept none."""
        run = self.log_dir / name
        if self.published is not None and not (run / "metrics.json").is_file():
            run = self.published / "runs" / name
        return documents.read(run, split)

    def _train_tokens(self) -> dict[int, int]:
        tokens = {}
        for path in sorted(Path(self.baseline.run.data.dir).glob("v*/meta.json")):
            meta = read_json(path)
            tokens[int(meta["vocab_size"])] = int(meta["splits"]["train"]["tokens"])
        return tokens

    # ---------------------------------------------------------------------------- time and money

    def rate(self, state: State, known: Rate | None = None) -> Rate:
        """From finished runs here, else `known`, else the study file's speed, else a probe."""
        done = [m for m in state.results.values() if m.get("train_seconds") and m.get("tokens")]
        if not done:
            return known or self._probed()
        last = done[-1]
        return Rate(
            flops_per_s=sum(m["flops_per_token"] * m["tokens"] for m in done)
            / sum(m["train_seconds"] for m in done),
            overhead_s=statistics.fmean(m["wall_seconds"] - m["train_seconds"] for m in done),
            usd_per_hour=costs.price_per_hour(last["device"], last["device_name"]),
            source=f"measured on {len(done)} runs of {self.log_dir}",
        )

    def _probed(self) -> Rate:
        """The stated speed, or a probe's; a probe also says which device is to be paid for."""
        settings = self.study.config
        probed: dict[str, Any] = {"device": "cpu", "device_name": "the CPU"}
        if settings.tokens_per_s is None or settings.device != "cpu":
            probed = speed.probe(self.study, self.threads)
        tokens_per_s = settings.tokens_per_s or probed["tokens_per_s"]
        return Rate(
            flops_per_s=tokens_per_s * self.baseline.flops_per_token,
            overhead_s=0.0,
            usd_per_hour=costs.price_per_hour(probed["device"], probed["device_name"]),
            source=f"{'probed' if settings.tokens_per_s is None else 'stated'} {tokens_per_s:,.0f} "
            f"tokens/s of {self.baseline.run.experiment} on {probed['device_name']}, evaluation "
            "not counted",
        )

    def spent(self, plan: Plan, rate: Rate) -> dict[str, float]:
        """Dollars by stage: finished runs, the checks, and what unfinished runs have used."""
        totals: dict[str, float] = {}
        for job in plan.jobs:
            cost = 0.0 if job.alias_of else self._cost(job, plan.state, rate)
            totals[job.stage] = totals.get(job.stage, 0.0) + cost
        return totals

    def _cost(self, job: Job, state: State, rate: Rate) -> float:
        result = state.sanity.get(job.name) or state.results.get(job.name, {})
        if result.get("cost_usd") is not None:
            return float(result["cost_usd"])
        if job.kind == "latency":
            seconds = state.latency.get(job.name, {}).get("wall_seconds", 0.0)
        else:
            rows = read_rows(self.log_dir / job.name / "metrics.jsonl")
            seconds = max((row.get("elapsed_s", 0.0) for row in rows), default=0.0)
        return seconds / 3600 * (rate.usd_per_hour or 0.0)


def spent_beside(plan: Plan) -> float:
    """Dollars of what else is in the log directory: tuning, runs by hand."""
    results = {**plan.state.results, **plan.state.others, **plan.state.sanity}
    for job in plan.jobs:
        results.pop(job.name, None)
    return sum(float(result.get("cost_usd") or 0.0) for result in results.values())


def diverged(path: Path) -> bool:
    """Whether the run's failure.json says that it met a NaN: a result, unlike other failures."""
    return (read_failure(path) or {}).get("kind") == "NonFinite"


def _begun(run: Path) -> bool:
    """Whether it was cut here and goes on from its checkpoints, whatever was published of it."""
    return (run / "checkpoints").exists() and not (run / "metrics.json").exists()


def _curve(run: Path, metrics: Mapping[str, Any]) -> Curve:
    """Its dev checks, of a published run from its curve.csv."""
    return read_curve(run) or [
        (row["tokens"], row["dev_perplexity"])
        for row in curve_rows(run, metrics)
        if row["kind"] == "dev"
    ]


def curve_rows(place: Path, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A published run's curve.csv as rows of metrics.jsonl: tokens, step, and one loss each."""
    path = place / "curve.csv"
    if not path.is_file():
        return []
    step_tokens = metrics["batch_size"] * metrics["seq_len"]
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for point in csv.DictReader(file):
            tokens = int(point["tokens"])
            for kind in ("train", "dev"):
                if point[f"{kind}_loss"]:
                    loss = float(point[f"{kind}_loss"])
                    row = {"kind": kind, "step": tokens // step_tokens, "tokens": tokens}
                    row |= {f"{kind}_loss": loss, f"{kind}_perplexity": math.exp(loss)}
                    rows.append(row)
    return rows


def _restore(published: Path, place: Path, resolved: Mapping[str, Any] | None) -> None:
    """A run directory from a publication, metrics.json last: finished, without checkpoints."""
    place.mkdir(parents=True, exist_ok=True)
    metrics = read_json(published / "metrics.json")
    lines = [json.dumps(row) + "\n" for row in curve_rows(published, metrics)]
    write_atomic(place / "metrics.jsonl", "".join(lines).encode())
    if resolved is not None and "config_digest" in resolved:
        write_atomic(place / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())
    for path in (*published.glob("documents_*.npz"), *published.glob("environment.json")):
        shutil.copyfile(path, place / path.name)
    write_atomic(place / "metrics.json", (published / "metrics.json").read_bytes())
