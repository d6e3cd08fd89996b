"""What the kill rule said while runs trained, beside what it says over their whole curves.

Live, the rule waits for nothing: a run that begins before its baseline is judged by less of the
baseline's curve, or by none. Here every judged run is held against the finished baseline, and where
it was let go on (`kill_rule.action: record`), what the rule would have saved and cost is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from scipy import stats

from src.analysis.kill_replay import Replay, replay
from src.analysis.run_csv import Row
from src.analysis.run_table import read_config, read_curve
from src.analysis.table_text import DASH, markdown
from src.spec import kill_rule
from src.spec.kill_rule import KillRule
from src.spec.names import run_name
from src.spec.run_identity import same_run

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One run that the rule judged: live at its last check, and over the whole curves.

    tokens: where it killed, live. baseline: the run whose whole curve was read, None where none is
    finished. whole: the verdict over both whole curves; None without such a baseline.
    replayed: its end and what stopping it saves, and the same without the grace period (the PRD's
    literal rule); None where it was stopped, for nobody knows how it would have ended. budget: in
    tokens.
    """

    run: str
    action: str
    live: kill_rule.Kind
    tokens: int | None
    baseline: str | None
    whole: kill_rule.Verdict | None
    replayed: Replay | None
    literal: Replay | None
    budget: int

    @property
    def differs(self) -> bool:
        """Whether the whole curves say otherwise than was said live: a run that begins before its
        baseline, or beside it, is judged at checks whose counterpart does not exist yet."""
        return self.whole is not None and (
            (self.whole.kind, self.whole.tokens) != (self.live, self.tokens)
        )


def judged(rows: Sequence[Row], configs: Mapping[str, Config] | None = None) -> list[Judged]:
    """Every run that a kill rule judged, in the rows' order.

    configs: config.yaml by run as the bundle beside a publication has them; None: each run's own.
    """

    def config_of(row: Row) -> Config:
        return read_config(Path(row["path"]))[0] if configs is None else configs.get(row["run"], {})

    by_name = {row["run"]: row for row in rows}
    by_content = {key: row for row in rows if _is_whole(row) and (key := same_run(row))}
    found = []
    for row in rows:
        if row.get("kill_verdict") is None or "path" not in row:
            continue
        config = config_of(row)
        if not config.get("kill_rule"):  # an edited config.yaml is not read
            continue
        name = run_name(row["baseline_name"], row["phase"], row["seed"])
        baseline = by_name.get(PurePosixPath(row["run"]).with_name(name).as_posix())
        if baseline is not None and not _is_whole(baseline):  # another run may stand for it
            baseline = by_content.get(same_run(baseline) or ())
        reference = None
        if baseline is not None:
            comparable = kill_rule.comparable(config, config_of(baseline))
            reference = read_curve(Path(baseline["path"])) if comparable else []
        found.append(_judge(row, config, baseline, reference))
    return found


def _judge(
    row: Row, config: Config, baseline: Row | None, reference: kill_rule.Curve | None
) -> Judged:
    curve = read_curve(Path(row["path"]))
    budget, rule = int(config["training"]["tokens"]), KillRule(**config["kill_rule"])
    stopped = row["tokens"] if row["status"] == "killed" else None
    whole = replayed = literal = None
    if reference is not None:
        whole = kill_rule.verdict(rule.in_run(budget), reference, curve)
        if reference and curve and curve[-1][0] == reference[-1][0]:
            replayed = replay(reference, curve, rule.in_run(budget))
            literal = replay(reference, curve, replace(rule, grace_tokens=0))
    return Judged(
        run=row["run"],
        action=rule.action,
        live=row["kill_verdict"],
        tokens=row.get("kill_tokens", stopped),
        baseline=None if baseline is None else baseline["run"],
        whole=whole,
        replayed=replayed,
        literal=literal,
        budget=budget,
    )


def _is_whole(row: Row) -> bool:
    return row["status"] == "finished" and "path" in row


def differences(found: Iterable[Judged]) -> list[str]:
    """A sentence for each run that the whole curves judge otherwise."""
    return [
        f"{one.run}: live {_said(one.live, one.tokens)}, over the whole curves "
        f"{_said(one.whole.kind, one.whole.tokens)}: {one.whole.reason}"
        for one in found
        if one.differs and one.whole is not None
    ]


def summary(found: Sequence[Judged]) -> str:
    """What the rule saves and costs over the runs that ran to the end, with its grace period and
    without, and the rate of its false kills among those that ended no worse than the baseline."""
    differing = sum(one.differs for one in found)
    told = f"{len(found)} runs judged, {differing} otherwise over the whole curves."
    for name, replays in (
        ("the rule", [one.replayed for one in found]),
        ("its literal reading (no grace)", [one.literal for one in found]),
    ):
        runs = [run for run in replays if run is not None]
        told += (
            f" Of {len(runs)} that ran to the end {name} kills "
            f"{sum(run.killed_at is not None for run in runs)}, "
            f"{sum(run.false_kill for run in runs)} of which ended no worse than the baseline"
            f"{_rate(runs)}; it saves {sum(run.tokens_saved for run in runs):,} of "
            f"{sum(run.budget for run in runs):,} tokens."
        )
    return told


def _rate(runs: Sequence[Replay]) -> str:
    innocent = [run.false_kill for run in runs if run.final_gap_ppl <= 0]
    if not innocent:
        return ""
    ends = stats.binomtest(sum(innocent), len(innocent)).proportion_ci(method="exact")
    return (
        f" ({sum(innocent)} of {len(innocent)} such, 95 % interval {100 * ends.low:.0f} to "
        f"{100 * ends.high:.0f} %)"
    )


def table(found: Sequence[Judged]) -> str:
    """A line a run, and what they come to."""
    head = "run | against | action | live | whole curves | PPL above it at the end | tokens saved"
    made = markdown(head, [_line(one) for one in found], "no run was judged by a kill rule")
    return f"{made}\n\n{summary(found)}" if found else made


def _line(one: Judged) -> list[str]:
    live = _said(one.live, one.tokens)
    if one.whole is None or one.baseline is None:
        return [one.run, DASH, one.action, live, "no finished baseline", DASH, DASH]
    whole = f"**{_said(one.whole.kind, one.whole.tokens)}**" if one.differs else live
    gap = saved = DASH
    if one.replayed is not None:
        wrong = ", killed wrongly" if one.replayed.false_kill else ""
        gap = f"{one.replayed.final_gap_ppl:+.2f}{wrong}"
        saved = f"{one.replayed.tokens_saved:,}"
    elif one.action == "stop" and one.tokens is not None:
        saved = f"{one.budget - one.tokens:,}"
    return [one.run, one.baseline, one.action, live, whole, gap, saved]


def _said(kind: str, tokens: int | None) -> str:
    return kind if tokens is None else f"{kind} at {tokens:,}"
