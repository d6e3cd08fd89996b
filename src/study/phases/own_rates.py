"""Phase 1 of a plan, a rate per configuration: every share at each learning rate of a list.

One learning rate favours the shapes that it suits: depth runs from 4 to 26 layers over the shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.analysis import decisions
from src.spec.rates import spelled
from src.study.phases.cells import RATES, Cell, Source, Study
from src.study.phases.ledger import Ledger
from src.study.phases.ranking import Floor, Shares


@dataclass(frozen=True, slots=True)
class Tried:
    """One share on the ranking budget: dev loss by learning rate of what finished, seed 0.

    listed: every rate that was to be tried; shared: the one that its sweep states.
    """

    losses: Mapping[float, float]
    listed: tuple[float, ...]
    shared: float

    @property
    def best(self) -> float | None:
        """The tried rate with the lowest loss; never one that was not tried."""
        return min(self.losses, key=lambda rate: self.losses[rate], default=None)

    @property
    def end(self) -> str:
        """Where the best is the list's lowest or highest rate: that it may lie beyond."""
        if self.best == max(self.listed):
            return ", the highest tried: its best may lie above"
        if self.best == min(self.listed):
            return ", the lowest tried: its best may lie below"
        return ""


def check(study: Study, stated: Mapping[str, float]) -> None:
    """Refuse a list that cannot be read beside the sweep's own rates. stated: those, by share."""
    listed = study.config.learning_rates
    if not listed and study.config.rate == "own":
        raise ValueError(
            f"{study.file}: rate: found own, expected learning_rates beside it, from which each "
            "share's own rate is chosen"
        )
    if not listed:
        return
    if any(text.startswith("training.learning_rate=") for text in study.overrides):
        raise ValueError(
            f"{study.file}: learning_rates: found an override of training.learning_rate beside "
            f"them, expected none: state the shared rate in {study.embedding.path}"
        )
    for name, rate in stated.items():
        if rate not in listed:
            raise ValueError(
                f"{study.file}: learning_rates: found {', '.join(map(spelled, listed))}, expected "
                f"the rate {spelled(rate)} of {name} in {study.embedding.path} among them: both "
                "readings need a run at it"
            )


def own_rates(ledger: Ledger, floor: Floor, shares: Shares) -> Shares:
    """Every share at every rate of the study; which share leads later stages, and at which rate.

    With `rate: shared` that is what `shares` says, and the readings are reported; with `rate: own`
    later stages train a sweep that this makes, each share at its own best rate.
    """
    listed = ledger.config.learning_rates
    if not listed:
        return shares
    raw = at_rates(ledger.study.embedding.raw, dict.fromkeys(ledger.embedding.names, listed))
    source = Source(ledger.generated("rates.yaml"), raw)
    sweep = ledger.sweep(source, "rank")
    cells = ledger.cells(sweep, sweep.names, [0])
    ledger.sweeps[source.path] = raw
    complete = ledger.schedule(RATES, cells, own_baseline=False)
    own, stated = ledger.config.rate == "own", _stated(ledger)
    if not (complete and floor.measured):
        if own and ledger.decided:
            ledger.assume("the shared rate is each share's own best")
        return _at(ledger, stated, (shares.leader,)) if own else shares
    tried = {
        name: _tried(ledger, [c for c in cells if c.run.experiment in sweep.named(name)], rate)
        for name, rate in stated.items()
    }
    promotion = _decide(ledger, floor, tried)
    if not own:
        return shares
    chosen = {name: found.best or found.shared for name, found in tried.items()}
    return _at(ledger, chosen, promotion.promoted)


def at_rates(
    raw: Mapping[str, Any], rates: Mapping[str, float | tuple[float, ...]]
) -> dict[str, Any]:
    """A share sweep with each experiment at its rate, or at each rate of its list; no kill rule.

    A single rate is part of the experiment's name, as it is for the runs of a list.
    """
    names = {
        name: name if isinstance(rate, tuple) else f"{name}-lr{spelled(rate)}"
        for name, rate in rates.items()
    }

    def at(entry: Mapping[str, Any]) -> dict[str, Any]:
        rate = rates[entry["name"]]
        asked = list(rate) if isinstance(rate, tuple) else rate
        training = {**(entry.get("training") or {}), "learning_rate": asked}
        return {**entry, "name": names[entry["name"]], "training": training}

    baseline = raw.get("baseline", raw["experiments"][0]["name"])
    return {
        **{key: value for key, value in raw.items() if key != "kill_rule"},
        "baseline": names[baseline],
        "experiments": [at(entry) for entry in raw["experiments"]],
    }


def _stated(ledger: Ledger) -> dict[str, float]:
    return {run.experiment: run.training.learning_rate for run in ledger.embedding.runs}


def _at(ledger: Ledger, rates: Mapping[str, float], promoted: Sequence[str]) -> Shares:
    raw = at_rates(ledger.study.embedding.raw, rates)
    source = Source(ledger.generated("own_rates.yaml"), raw)
    ledger.sweeps[source.path] = raw
    leader, *others = (f"{name}-lr{spelled(rates[name])}" for name in promoted)
    return Shares(leader, others[0] if others else None, source)


def _tried(ledger: Ledger, cells: Sequence[Cell], shared: float) -> Tried:
    losses = {
        cell.run.training.learning_rate: found[0]
        for cell in cells
        if (found := ledger.losses([cell]))
    }
    return Tried(losses, tuple(cell.run.training.learning_rate for cell in cells), shared)


def _decide(ledger: Ledger, floor: Floor, tried: Mapping[str, Tried]) -> decisions.Promotion:
    """Both readings side by side, with one seed on either side of every comparison."""
    own = {name: [t.losses[t.best]] for name, t in tried.items() if t.best is not None}
    shared = {name: [t.losses[t.shared]] for name, t in tried.items() if t.shared in t.losses}
    readings = [decisions.promote(losses, floor.noise) for losses in (own, shared)]
    numbers = []
    for name, found in tried.items():
        best = "nothing finished"
        if found.best is not None:
            best = f"{own[name][0]:.4f} at its best, {spelled(found.best)}{found.end}"
        at = f"{shared[name][0]:.4f}" if name in shared else "not finished"
        numbers.append(f"{name}: {best}; {at} at the shared {spelled(found.shared)}")
    orders = [[name for name, _ in promotion.ranking] for promotion in readings]
    told = [" or ".join(promotion.promoted) for promotion in readings]
    ledger.decide(
        "1", "embedding share at each one's own best rate, and at the shared rate", numbers,
        f"own best: {told[0]}; shared: {told[1]}",
        f"{'the same' if orders[0] == orders[1] else 'another'} order of the shares. Own best: "
        f"{readings[0].reason} Shared: {readings[1].reason} One seed a run; no rate beyond the "
        "list is guessed, and the lowest of several runs flatters every share alike. Later stages "
        f"train at {'each own best' if ledger.config.rate == 'own' else 'the shared'} rate.",
    )  # fmt: skip
    return readings[0]
