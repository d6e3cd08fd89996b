"""Fills the table's gaps: drops copies, lends an equal run's numbers, lists missing runs. Pure.

A sweep's run may have been trained under another name (`emb35` and `glu266x` can be one model):
then its row carries the other's numbers, without its cost. What is one run, and what is not, is
decided in src/spec/run_identity.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from src.analysis.run_csv import Row
from src.spec.metric_keys import REQUESTS
from src.spec.names import run_name
from src.spec.run_identity import DATA, same_copy, same_run

Sweep = Mapping[str, Any]  # what config.yaml says of the sweep's file
STATUSES = ("finished", "killed", "failed", "unfinished", "missing")
UNPLANNED = "unplanned"
# What a run cost, and where it lies, stands in its own row alone.
_OWN = ("path", "train_seconds", "eval_seconds", "wall_seconds", "gpu_hours", "cost_usd")


class Sweeps:
    """The sweeps that runs belong to, as their config.yaml list them: the longest list counts."""

    def __init__(self) -> None:
        # By file and phase; the phase is None where no seeds are listed for it.
        self._sweeps: dict[tuple[str, str | None], Sweep] = {}

    def add(self, config: Mapping[str, Any]) -> None:
        sweep = config.get("sweep")
        if not isinstance(sweep, dict) or not isinstance(sweep.get("file"), str):
            return
        if not all(isinstance(sweep.get(key, []), list) for key in ("experiments", "seeds")):
            return
        planned = sweep.get("seeds") and sweep.get("phase") == config.get("phase")
        key = (sweep["file"], sweep.get("phase") if planned else None)
        if _size(sweep) > _size(self._sweeps.setdefault(key, sweep)):
            self._sweeps[key] = sweep

    def unbegun(self, rows: Iterable[Row], prefix: str = "") -> list[Row]:
        """Runs that a sweep lists, in a phase that was begun, and that were not begun themselves.

        prefix: how the names of these sweeps' runs begin, where `rows` has others too.
        A sweep that lists no seeds lacks an experiment only where no run of it was begun. A seed
        that other experiments were given by hand is nobody's plan: its row is only a question.
        """
        begun = [row for row in rows if row["run"].startswith(prefix)]
        known = {row["run"] for row in begun}  # a run whose config.yaml is not readable, too
        listed = [row | {"run": f"{prefix}{row['run']}"} for row in self._listed(begun)]
        return [row for row in listed if row["run"] not in known]

    def _listed(self, rows: Sequence[Row]) -> Iterator[Row]:
        identity = ("sweep", "phase", "experiment", "seed")
        begun = {tuple(row.get(key) for key in identity) for row in rows}
        named = {(file, name) for file, _, name, _ in begun}
        planned = {file for file, phase in self._sweeps if phase is not None}
        for (file, phase), sweep in sorted(self._sweeps.items(), key=lambda item: str(item[0])):
            seeds = {s for f, p, _, s in begun if (f, p) == (file, phase) and s is not None}
            for name in map(str, sweep.get("experiments") or ()):
                row = _missing(sweep, name)
                if phase is None:
                    if file not in planned and (file, name) not in named:
                        yield row | {"run": name}
                    continue
                for seed in sorted({*sweep["seeds"], *seeds}):
                    if (file, phase, name, seed) not in begun:
                        own = {"run": run_name(name, phase, seed), "phase": phase, "seed": seed}
                        status = "missing" if seed in sweep["seeds"] else UNPLANNED
                        yield row | own | {"status": status}


def each_once(rows: Iterable[Row]) -> list[Row]:
    """Rows without those of copied directories; the furthest copy is kept and names the others."""
    kept: dict[Any, Row] = {}
    for index, row in enumerate(rows):
        key = same_copy(row) or index
        other = kept.setdefault(key, row)
        if other is not row:
            better, worse = sorted((other, row), key=lambda r: STATUSES.index(r["status"]))
            note = f"also found as {worse['run']}, counted once"
            kept[key] = better | {"reason": and_also(better, note)}
    return list(kept.values())


def and_also(row: Row, note: str) -> str:
    """The row's reason, and a note behind it."""
    return f"{row['reason']}; {note}" if row.get("reason") else note


def provided(unbegun: Iterable[Row], rows: Sequence[Row]) -> Iterator[Row]:
    """Each row that nobody began: with the numbers of the finished run that is the same, if any."""
    finished: dict[Any, Row] = {}
    for row in rows:
        if row["status"] == "finished" and (key := same_run(row)) is not None:
            finished.setdefault(key, row)
    for row in unbegun:
        other = finished.get(same_run(row | _data_of(row, rows)))
        if other is not None:
            yield stands_for(other, row)
        elif row["status"] != UNPLANNED:
            yield row


def aliases(study: Mapping[str, Any], rows: Sequence[Row], prefix: str = "") -> list[Row]:
    """Configurations that a study did not train because an equal one was."""
    known = {row["run"]: row for row in rows}
    result = []
    for alias in study.get("aliases", []):
        other = known.get(f"{prefix}{alias['alias_of']}", {})
        name = f"{prefix}{alias['run']}"
        if other.get("status") in ("finished", "killed") and name not in known:
            result.append(stands_for(other, {**alias, "run": name}))
    return result


def stands_for(other: Row, own: Mapping[str, Any]) -> Row:
    """The row of a run under its own name, with what the other asked for and measured."""
    names = ("run", "experiment", "sweep", "baseline", "baseline_name")
    requested = {key: own[key] for key in (*names, *(q.asked for q in REQUESTS)) if key in own}
    kept = {key: value for key, value in other.items() if key not in _OWN}
    reason = f"the same model and training as {other['run']}"
    return kept | requested | {"same_as": other["run"], "reason": reason}


def _data_of(row: Row, rows: Sequence[Row]) -> Row:
    """The tokens that a run would read: those of its sweep with its vocabulary, else of its corpus;
    nothing where that is not one set of tokens."""
    alike = [r for r in rows if r.get("vocab_size") == row.get("vocab_size") and r.get(DATA[-1])]
    corpora = {r.get("corpus") for r in rows if r.get("sweep") == row["sweep"]}
    near = [r for r in alike if r.get("sweep") == row["sweep"]]
    near = near or [r for r in alike if r.get("corpus") in corpora]
    datasets = {tuple(r.get(key) for key in DATA) for r in near}
    return dict(zip(DATA, datasets.pop(), strict=True)) if len(datasets) == 1 else {}


def built_of(sweep: Mapping[str, Any], experiment: Any) -> Row:
    """What the sweep's config.yaml says would be built of an experiment, if it says it."""
    built = sweep.get("built")
    shape = built.get(experiment) if isinstance(built, dict) else None
    return shape if isinstance(shape, dict) else {}


def _missing(sweep: Sweep, name: str) -> Row:
    return {
        **built_of(sweep, name),
        "status": "missing",
        "reason": f"named in {sweep['file']}, but no run of it was begun and none is the same",
        "experiment": name,
        "sweep": sweep["file"],
        "baseline": name == sweep.get("baseline"),
        "baseline_name": sweep.get("baseline"),
    }


def _size(sweep: Sweep) -> int:
    return len(sweep.get("experiments") or ()) * max(1, len(sweep.get("seeds") or ()))
