"""The training loop: its schedule, its bits, and what a cut, a NaN or a kill leaves behind."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from src import train
from src.evaluation import metrics as run_metrics
from src.spec.config import TrainingConfig
from src.storage.run_dir import RunDir
from src.training_step import NonFinite, build_model, build_optimizer, learning_rate
from tests.runs import CPU, Lab, assert_same

FINAL_STEP = 20


class Cut(BaseException):
    """The process dies here: nothing of ours may catch it, and nothing is saved on the way."""


@pytest.fixture
def lab(tiny_sweep: Path, tmp_path: Path) -> Lab:
    return Lab(tiny_sweep, tmp_path)


@pytest.fixture(scope="module")
def reference(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One uninterrupted run of `base`; not to be written to."""
    lab = Lab(tiny_sweep, tmp_path_factory.mktemp("reference"))
    lab.outcome = lab.train()
    assert lab.outcome.status == "trained"
    yield lab


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Any], None]], None]:
    """Calls something just before the update of a step (from 1)."""

    def plant(step: int, act: Callable[[Any], None]) -> None:
        update = train.Trainer.update

        def sabotaged(self: train.Trainer, nats: Any, rate: float) -> tuple[float, float]:
            if self.step + 1 == step:
                act(self)
            return update(self, nats, rate)

        monkeypatch.setattr(train.Trainer, "update", sabotaged)

    return plant


@pytest.fixture
def cut_before(lab, at_step, monkeypatch) -> Callable[[int], None]:
    """Trains `base`, with a checkpoint every 5 steps, until it dies just before a step's update."""

    def die(_: Any) -> None:
        raise Cut

    def cut(step: int, every: int = 5) -> None:
        at_step(step, die)
        with pytest.raises(Cut):
            lab.train("base", f"training.checkpoint_every_steps={every}")
        monkeypatch.undo()

    return cut


def assert_same_run(ours: Lab, theirs: Lab) -> None:
    assert ours.rows() == theirs.rows()
    assert_same(ours.state(), theirs.state())


# ------------------------------------------------------------------------------------ the recipe


def test_the_schedule_is_linear_up_and_linear_to_zero():
    training = TrainingConfig(
        tokens=100 * 256, batch_size=8, seq_len=32, learning_rate=0.5, warmup_fraction=0.05
    )
    rates = [learning_rate(training, step) for step in range(100)]
    assert (training.steps, training.warmup_steps) == (100, 5)
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5:] == pytest.approx([0.5 * (100 - step) / 95 for step in range(5, 100)])
    assert max(rates) == 0.5 and rates[-1] == pytest.approx(0.5 / 95)
    without = replace(training, warmup_fraction=0.0)
    assert learning_rate(without, 0) == 0.5 and learning_rate(without, 50) == 0.25
    single = replace(training, tokens=256)
    assert single.steps == 1 and learning_rate(single, 0) == 0.5


def test_every_parameter_has_its_group(lab):
    run, allocation, _, _ = lab.plan("base", "training.embedding_lr_ratio=3")
    model = build_model(allocation.model, 0)
    groups = build_optimizer(model, run.training).param_groups
    assert [(g["lr_ratio"], g["weight_decay"]) for g in groups] == [
        (3.0, 0.1),
        (1.0, 0.1),
        (1.0, 0),
    ]
    tables, matrices, norms = (g["params"] for g in groups)
    assert [p.shape for p in tables] == [(300, 48)]
    assert all(p.ndim == 1 for p in norms) and all(p.ndim == 2 for p in matrices)
    grouped = [id(p) for p in (*tables, *matrices, *norms)]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_the_embedding_rate_is_its_ratio_times_the_rate(lab, at_step):
    seen: list[list[float]] = []
    at_step(3, lambda trainer: seen.append([g["lr"] for g in trainer.optimizer.param_groups]))
    lab.train("base", "training.embedding_lr_ratio=3", "training.tokens=768")
    (rates,) = seen  # as set by the update of step 2
    training = TrainingConfig(tokens=768, batch_size=8, seq_len=32)
    expected = learning_rate(training, 1)
    assert rates == pytest.approx([3 * expected, expected, expected])


def test_the_seed_decides_the_first_weights(lab):
    _, allocation, _, _ = lab.plan()
    first, same, other = (build_model(allocation.model, seed).state_dict() for seed in (1, 1, 2))
    assert_same(first, same)
    assert not torch.equal(first["embedding.table"], other["embedding.table"])


# ---------------------------------------------------------------------------------- a whole run


def test_a_run_learns_and_leaves_its_record(reference):
    rows = reference.rows()
    trained = [row for row in rows if row["kind"] == "train"]
    dev = [row for row in rows if row["kind"] == "dev"]
    assert [row["step"] for row in trained] == list(range(1, FINAL_STEP + 1))
    assert [row["step"] for row in dev] == [0, 5, 10, 15, 20]
    assert all(row["tokens"] == 256 * row["step"] for row in rows)
    training = reference.plan()[0].training
    assert [row["learning_rate"] for row in trained] == [
        learning_rate(training, step) for step in range(FINAL_STEP)
    ]
    assert abs(trained[0]["train_loss"] - math.log(300)) < 0.1
    assert dev[-1]["dev_loss"] < dev[0]["dev_loss"] - 0.3
    assert all(row["dev_perplexity"] == math.exp(row["dev_loss"]) for row in dev)
    assert list((reference.path() / "tensorboard").iterdir())


def test_the_outcome_names_the_largest_one_step_rise(reference):
    losses = [row["train_loss"] for row in reference.rows() if row["kind"] == "train"]
    rises = [after - before for before, after in itertools.pairwise(losses)]
    assert reference.outcome.metrics["loss_largest_rise_nats"] == max(rises)
    assert reference.outcome.metrics["loss_largest_rise_step"] == rises.index(max(rises)) + 2


def test_a_rerun_is_equal_to_the_last_bit(reference, lab):
    lab.train()
    assert_same_run(lab, reference)


def test_micro_batches_add_up_to_the_batch(reference, lab):
    lab.train(compute=replace(CPU, micro_batch=2))
    for ours, theirs in zip(lab.rows(), reference.rows(), strict=True):
        key = "train_loss" if ours["kind"] == "train" else "dev_loss"
        assert ours[key] == pytest.approx(theirs[key], rel=2e-4)


def test_bf16_follows_float32(reference, lab):
    lab.train(compute=replace(CPU, precision="bf16"))
    ours, theirs = lab.rows()[-1], reference.rows()[-1]
    assert ours["kind"] == theirs["kind"] == "dev"
    assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], abs=0.05)
    weights = lab.state()["model"]
    assert all(weight.dtype == torch.float32 for weight in weights.values())


OTHER = replace(CPU, micro_batch=2, precision="bf16")


@pytest.mark.parametrize(("cut_at", "compute"), [(1, CPU), (4, CPU), (11, OTHER), (20, CPU)])
def test_a_cut_run_resumes_to_the_same_bits(reference, lab, cut_before, cut_at, compute):
    """Checkpoints every 5 steps (a cosmetic key); a cut before the first one starts again. A host
    that would choose another micro-batch and precision takes the checkpoint's."""
    cut_before(cut_at)
    assert lab.rows()[-1]["step"] == cut_at - 1
    again = lab.train("base", "training.checkpoint_every_steps=7", compute=compute)
    assert again.status == "trained"
    assert_same_run(lab, reference)


def test_a_run_cut_three_times_resumes_to_the_same_bits(reference, lab, cut_before):
    for cut_at in (3, 9, 17):
        cut_before(cut_at, every=2)
    lab.train()
    assert_same_run(lab, reference)


def flip_the_newest(run: Path) -> None:
    newest = sorted((run / "checkpoints").glob("step-00000015-*.pt"))[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)


def lose_rows(run: Path, last: int | None) -> None:
    """As a power cut takes them."""
    log = run / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:last]))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_the_newest, "going on from step 10"),
        (lambda run: lose_rows(run, -1), "lost rows.*going on from step 10"),
        (lambda run: lose_rows(run, -6), "lost rows.*going on from step 10"),
    ],
)
def test_a_newest_checkpoint_that_does_not_fit_falls_back_to_the_one_before(
    reference, lab, cut_before, damage, says
):
    """The newest, of step 15, is damaged or has counted on rows that are lost."""
    cut_before(16)
    damage(lab.path())
    with pytest.warns(UserWarning, match=says):
        lab.train()
    assert_same_run(lab, reference)


def test_rows_that_no_checkpoint_can_do_without_are_not_made_up(lab, cut_before):
    cut_before(16)
    lose_rows(lab.path(), 1)
    with pytest.raises(ValueError, match="none that can be trusted.*lost rows"):
        lab.train()


def test_a_preempted_run_saves_where_it_stands(reference, lab, at_step, monkeypatch):
    at_step(7, lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    outcome = lab.train()
    assert outcome.status == "preempted" and "SIGUSR1" in str(outcome.reason)
    assert outcome.step == lab.state()["step"] == 7
    monkeypatch.undo()
    assert lab.train().status == "trained"
    assert_same_run(lab, reference)


def test_a_checkpoint_of_another_config_is_refused(lab):
    lab.train("base", "training.tokens=512")
    run, _, sweep, tokens = lab.plan()
    _, digest = run_metrics.resolved(run, lab.answers, sweep, tokens)
    digests = run_metrics.digests(digest, tokens)
    with (
        RunDir.open(lab.log_dir / "logs", "base") as directory,
        pytest.raises(ValueError, match="config"),
    ):
        train.train(lab.context(run, sweep, tokens), directory, CPU, digests)


# ------------------------------------------------------------------------------------ not finite


def test_a_gradient_that_is_not_finite_stops_before_the_step(reference, lab, at_step, monkeypatch):
    weights: list[Any] = []

    def poison(trainer: train.Trainer) -> None:
        next(trainer.model.parameters()).grad[0, 0] = float("inf")
        weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        weights.append(trainer.model.state_dict())

    at_step(12, poison)
    with pytest.raises(NonFinite, match=r"step 12: loss \d.*gradient norm (inf|nan)"):
        lab.train("base", "training.checkpoint_every_steps=5")
    before, after = weights
    assert_same(before, after)  # the update never happened
    assert lab.state()["step"] == 10 and lab.rows()[-1]["step"] == 11
    monkeypatch.undo()
    lab.train()
    assert_same(lab.state(), reference.state())


def test_a_loss_that_is_not_finite_stops_before_the_step(lab, monkeypatch):
    accumulate = train.Trainer.accumulate

    def poisoned(self: train.Trainer) -> torch.Tensor:
        nats = accumulate(self)
        return nats * float("nan") if self.step == 3 else nats

    monkeypatch.setattr(train.Trainer, "accumulate", poisoned)
    with pytest.raises(NonFinite, match="step 4: loss nan"):
        lab.train()
    assert not list((lab.path() / "checkpoints").glob("*.json")) or lab.state()["step"] <= 3


# ---------------------------------------------------------------------------------- the kill rule
RULE = ("kill_rule.margin_ppl=0.5", "kill_rule.window_tokens=1280", "kill_rule.grace_tokens=0")


@pytest.fixture(scope="module")
def judged(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """`base`, then `idle`, whose outcome it is, under RULE; not to be written to."""
    lab = Lab(tiny_sweep, tmp_path_factory.mktemp("judged"))
    assert "kill_verdict" not in lab.train("base", *RULE).metrics  # the baseline judges nobody
    lab.outcome = lab.train("idle", *RULE)
    return lab


@pytest.fixture
def baseline(judged, lab) -> Callable[[], None]:
    """Puts the trained `base` where `lab` trains."""
    return lambda: shutil.copytree(judged.path(), lab.path())


def test_a_run_far_behind_the_baseline_is_killed_at_the_window(judged):
    assert judged.outcome.status == "killed" and judged.outcome.metrics["kill_verdict"] == "kill"
    event = [row for row in judged.rows("idle") if row["kind"] == "event"]
    base, idle = (
        {row["tokens"]: row["dev_perplexity"] for row in judged.rows(name) if row["kind"] == "dev"}
        for name in ("base", "idle")
    )
    bad = [tokens for tokens in sorted(idle) if tokens and idle[tokens] - base[tokens] >= 0.5]
    first = next(tokens for tokens in bad if tokens - bad[0] >= 1280)
    assert [(row["event"], row["tokens"]) for row in event] == [("killed", first)]
    assert judged.outcome.step == first // 256 == judged.state("idle")["step"] < FINAL_STEP


def test_a_kill_that_was_cut_short_is_a_kill_again(judged, lab):
    shutil.copytree(judged.log_dir / "logs", lab.log_dir / "logs")
    first, again = judged.outcome, lab.train("idle", *RULE)  # it died after the verdict
    assert (again.status, again.step, again.reason) == ("killed", first.step, first.reason)
    assert len([row for row in lab.rows("idle") if row["kind"] == "event"]) == 1


def test_record_writes_the_verdict_and_lets_the_run_go_on(judged, lab, baseline):
    baseline()
    recorded, stopped = lab.train("idle", *RULE, "kill_rule.action=record"), judged.outcome
    assert (recorded.status, recorded.step) == ("trained", FINAL_STEP)
    metrics = recorded.metrics
    assert (metrics["kill_verdict"], metrics["kill_action"]) == ("kill", "record")
    assert metrics["kill_tokens"] == stopped.metrics["kill_tokens"] == stopped.step * 256
    ours, theirs = checks_by_the_rule(lab), checks_by_the_rule(judged)
    assert ours[: len(theirs)] == theirs and len(ours) > len(theirs)
    assert {row["verdict"] for row in ours[len(theirs) :]} == {"kill"}


def checks_by_the_rule(lab: Lab) -> list[dict[str, Any]]:
    return [row for row in lab.rows("idle") if row["kind"] == "kill_rule"]


def test_each_check_says_which_part_of_the_baselines_curve_was_there(lab, at_step, baseline):
    """A rival that starts before its baseline gets no verdict, and its checks say why."""
    at_step(15, lambda _: baseline())
    outcome = lab.train("idle", *RULE)
    checks = checks_by_the_rule(lab)
    blind = [row for row in checks if row["step"] < 15]
    assert {(r["verdict"], r["baseline_checks"], r["baseline_tokens"]) for r in blind} == {
        ("none", 0, None)
    }
    assert outcome.metrics["kill_checks_without_baseline"] == len(blind) == 2
    assert checks[len(blind)]["baseline_check"] and outcome.status == "killed"
    assert checks[-1]["baseline_tokens"] == FINAL_STEP * 256
    assert outcome.metrics["kill_tokens"] == checks[-1]["tokens"] == 15 * 256


@pytest.mark.parametrize("cut", [15, FINAL_STEP])
def test_a_check_that_was_passed_is_passed_when_the_run_comes_back_to_it(
    lab, at_step, baseline, cut
):
    """Though the baseline is there by now: the run would else end otherwise than an uncut one."""
    at_step(cut, lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    first = lab.train("idle", *RULE)
    assert first.status == "preempted" and first.step == cut
    before = checks_by_the_rule(lab)
    baseline()
    outcome, checks = lab.train("idle", *RULE), checks_by_the_rule(lab)
    assert checks[: len(before)] == before and before[-1]["verdict"] == "none"
    ended = ("killed", "kill") if cut < FINAL_STEP else ("trained", "none")
    assert (outcome.status, outcome.metrics["kill_verdict"]) == ended
    assert (checks[-1]["verdict"], len(checks) > len(before)) == (ended[1], cut < FINAL_STEP)


def test_grace_changes_the_verdict_and_both_are_recorded(lab, baseline):
    baseline()
    outcome = lab.train("idle", *RULE[:2], "kill_rule.grace_tokens=4000")
    assert (outcome.status, outcome.step) == ("trained", FINAL_STEP)
    metrics = outcome.metrics
    assert (metrics["kill_verdict"], metrics["kill_verdict_literal"]) == ("keep", "kill")


@pytest.mark.parametrize("other", [None, "training.tokens=10_240"])
def test_without_a_baseline_of_the_same_budget_there_is_no_verdict(lab, at_step, other):
    if other is not None:
        at_step(21, lambda _: os.kill(os.getpid(), signal.SIGUSR1))  # its first half is enough
        lab.train("base", *RULE, other)
    outcome = lab.train("idle", *RULE)
    assert (outcome.status, outcome.metrics["kill_verdict"]) == ("trained", "none")
    assert outcome.metrics["kill_verdict_literal"] == "none"


def test_a_resume_keeps_the_compute_digest_and_another_machine_adds_its_own(
    reference, lab, cut_before, monkeypatch
):
    whole = reference.outcome.conditions
    assert len(whole) == 1 and whole[0]["processes"] == 1 and len(whole[0]["source_sha256"]) == 64
    cut_before(11)
    assert lab.train().conditions == whole
    monkeypatch.setattr(train.conditions.np, "__version__", "0.1")
    both = lab.train().conditions
    assert both[0] == whole[0] and [attempt["numpy"] for attempt in both][1:] == ["0.1"]


def test_the_source_digest_follows_what_training_imports_and_nothing_else(tmp_path):
    package = Path(train.__file__).parent
    copy = tmp_path / "src"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    digest = train.conditions.source_sha256
    digest.cache_clear()
    first = digest(copy)
    assert first == digest(package)
    (copy / "science.py").write_text("")
    digest.cache_clear()
    assert digest(copy) == first
    inner = next(copy.rglob("transformer.py"))
    inner.write_text(inner.read_text() + "\n# a comment is bytes too\n")
    digest.cache_clear()
    assert digest(copy) != first


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "a: [\n"),
        ("config.yaml", "a: 1\n"),
        ("config.yaml", "- 1\n"),
        ("metrics.jsonl", '{"kind": "dev", "step": 1, "dev_perplexity": 9.0}\n'),
        ("metrics.jsonl", '{"kind": "dev",\n{}\n'),
        ("metrics.jsonl", '{"kind": "dev", "tokens": 9, "dev_perplexity": NaN}\n'),
        ("metrics.jsonl", '{"kind": "dev", "tokens": 9, "dev_perplexity": "9"}\n'),
    ],
)
def test_a_damaged_baseline_gives_no_verdict_and_stops_nobody(lab, baseline, capsys, file, content):
    baseline()
    (lab.path("base") / file).write_text(content)
    outcome = lab.train("idle", *RULE)
    assert (outcome.status, outcome.metrics["kill_verdict"]) == ("trained", "none")
    assert f"idle: no verdict: {lab.path('base')} cannot be read" in capsys.readouterr().out
