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
class JudgedRun:
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


def judge_runs(rows: Sequence[Row], configs: Mapping[str, Config] | None = None) -> list[JudgedRun]:
    """Every run that a kill rule judged, in the rows' order.

    configs: config.yaml by run as the bundle beside a publication has them; None: each run's own.
    """

    def config_of(row: Row) -> Config:
        return read_config(Path(row["path"]))[0] if configs is None else configs.get(row["run"], {})

    by_name = {row["run"]: row for row in rows}
    by_content = {key: row for row in rows if _is_whole(row) and (key := same_run(row))}
    result = []
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
        result.append(_judge(row, config, baseline, reference))
    return result


def _judge(
    row: Row, config: Config, baseline: Row | None, reference: kill_rule.Curve | None
) -> JudgedRun:
    curve = read_curve(Path(row["path"]))
    budget, rule = int(config["training"]["tokens"]), KillRule(**config["kill_rule"])
    stopped = row["tokens"] if row["status"] == "killed" else None
    whole = replayed = literal = None
    if reference is not None:
        whole = kill_rule.verdict(rule.in_run(budget), reference, curve)
        if reference and curve and curve[-1][0] == reference[-1][0]:
            replayed = replay(reference, curve, rule.in_run(budget))
            literal = replay(reference, curve, replace(rule, grace_tokens=0))
    return JudgedRun(
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


def differences(runs: Iterable[JudgedRun]) -> list[str]:
    """A sentence for each run that the whole curves judge otherwise."""
    return [
        f"{run.run}: live {_verdict_text(run.live, run.tokens)}, over the whole curves "
        f"{_verdict_text(run.whole.kind, run.whole.tokens)}: {run.whole.reason}"
        for run in runs
        if run.differs and run.whole is not None
    ]


def summary(runs: Sequence[JudgedRun]) -> str:
    """What the rule saves and costs over the runs that ran to the end, with its grace period and
    without, and the rate of its false kills among those that ended no worse than the baseline."""
    differing = sum(run.differs for run in runs)
    text = f"{len(runs)} runs judged, {differing} otherwise over the whole curves."
    for name, replays in (
        ("the rule", [run.replayed for run in runs]),
        ("its literal reading (no grace)", [run.literal for run in runs]),
    ):
        replayed = [r for r in replays if r is not None]
        text += (
            f" Of {len(replayed)} that ran to the end {name} kills "
            f"{sum(r.killed_at is not None for r in replayed)}, "
            f"{sum(r.false_kill for r in replayed)} of which ended no worse than the baseline"
            f"{_rate(replayed)}; it saves {sum(r.tokens_saved for r in replayed):,} of "
            f"{sum(r.budget for r in replayed):,} tokens."
        )
    return text


def _rate(runs: Sequence[Replay]) -> str:
    not_worse = [run.false_kill for run in runs if run.final_gap_ppl <= 0]
    if not not_worse:
        return ""
    ends = stats.binomtest(sum(not_worse), len(not_worse)).proportion_ci(method="exact")
    return (
        f" ({sum(not_worse)} of {len(not_worse)} such, 95 % interval {100 * ends.low:.0f} to "
        f"{100 * ends.high:.0f} %)"
    )


def table(runs: Sequence[JudgedRun]) -> str:
    """A line a run, and what they come to."""
    head = "run | against | action | live | whole curves | PPL above it at the end | tokens saved"
    text = markdown(head, [_line(run) for run in runs], "no run was judged by a kill rule")
    return f"{text}\n\n{summary(runs)}" if runs else text


def _line(run: JudgedRun) -> list[str]:
    live = _verdict_text(run.live, run.tokens)
    if run.whole is None or run.baseline is None:
        return [run.run, DASH, run.action, live, "no finished baseline", DASH, DASH]
    whole = f"**{_verdict_text(run.whole.kind, run.whole.tokens)}**" if run.differs else live
    gap = saved = DASH
    if run.replayed is not None:
        wrong = ", killed wrongly" if run.replayed.false_kill else ""
        gap = f"{run.replayed.final_gap_ppl:+.2f}{wrong}"
        saved = f"{run.replayed.tokens_saved:,}"
    elif run.action == "stop" and run.tokens is not None:
        saved = f"{run.budget - run.tokens:,}"
    return [run.run, run.baseline, run.action, live, whole, gap, saved]


def _verdict_text(kind: str, tokens: int | None) -> str:
    return kind if tokens is None else f"{kind} at {tokens:,}"
