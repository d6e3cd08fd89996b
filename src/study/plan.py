"""The plan of a study: which runs come next, and what the finished ones decide.

Pure functions of the study file and of what finished runs measured; no file, clock or device.
Where a choice has not been made yet (which share leads?) the plan assumes one, so that the whole
study can be counted in advance; an assumed job is never run.
"""

from __future__ import annotations

from src.study.phases import finals, own_rates, ranking, vocabulary
from src.study.phases.cells import Plan, Record, Study
from src.study.phases.ledger import Ledger


def plan(study: Study, record: Record) -> Plan:
    """What is to be done next and what is decided; raises ValueError for sweeps that do not fit."""
    ledger = Ledger(study, record)
    _check_budgets(ledger)
    stated = {run.experiment: run.training.learning_rate for run in ledger.embedding.runs}
    own_rates.check(study, stated)
    floor = ranking.sanity(ledger)
    shares = own_rates.own_rates(ledger, floor, ranking.shares(ledger, floor))
    expansions = ranking.expansions(ledger, floor, shares)
    if study.vocabulary is not None:
        vocabulary.vocabularies(ledger, study.vocabulary, shares)
    finals.finals(ledger, shares, expansions)
    jobs = tuple(ledger.jobs)
    return Plan(
        jobs=jobs,
        decisions=tuple(ledger.decisions),
        sweeps=ledger.sweeps,
        assumptions=tuple(ledger.assumptions),
        winner=ledger.winner,
        aliased=tuple(ledger.aliased),
        complete=all((job.done or job.alias_of) and not job.assumed for job in jobs),
    )


def _check_budgets(ledger: Ledger) -> None:
    study = ledger.study
    ours, theirs = ledger.embedding.runs[0].model, ledger.sweep(study.glu, "rank").runs[0].model
    for key in ("total_params", "vocab_size"):
        if getattr(ours, key) != getattr(theirs, key):
            raise ValueError(
                f"{study.file}: glu: found model.{key} {getattr(theirs, key):,} in "
                f"{study.glu.path}, expected {getattr(ours, key):,} as in "
                f"{study.embedding.path}: one study compares cells of one budget"
            )
