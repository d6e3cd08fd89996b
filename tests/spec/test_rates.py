"""Lists of learning rates: one run per rate, everything else as stated."""

from __future__ import annotations

import dataclasses

import pytest

from run_experiment import main
from src.spec.config import load_sweep
from src.spec.rates import spelled

SWEEP = """\
model: {total_params: 2_621_440, vocab_size: 8_192}
experiments:
  - {name: a, embedding_ratio: 0.35}
  - {name: b, embedding_ratio: 0.45, training: {weight_decay: 0.2}}
training: {tokens: 524_288, batch_size: 16, learning_rate: [2e-3, 4e-3, 0.016]}
"""


@pytest.mark.parametrize(
    ("rate", "text"),
    [(2e-3, "2e-3"), (0.016, "1.6e-2"), (1.0, "1e0"), (1 / 3 * 3e-3, "1e-3"), (1.25e-4, "1.25e-4")],
)
def test_rates_are_spelled_as_people_write_them(rate, text):
    assert spelled(rate) == text


def test_one_run_per_rate_and_all_else_as_stated(load):
    sweep, single = load(SWEEP), load(SWEEP.replace("[2e-3, 4e-3, 0.016]", "4e-3"))
    assert sweep.names == tuple(f"{n}-lr{r}" for n in "ab" for r in ("2e-3", "4e-3", "1.6e-2"))
    assert [run.training.learning_rate for run in sweep.runs] == [2e-3, 4e-3, 0.016] * 2
    assert sweep.baseline == "a-lr2e-3"  # the first rate of the first experiment
    for name in "ab":
        one, plain = sweep.run(f"{name}-lr4e-3", 3), single.run(name, 3)
        assert one.run_name == f"{name}-lr4e-3-seed3"
        assert dataclasses.replace(one, experiment="", baseline="") == dataclasses.replace(
            plain, experiment="", baseline=""
        )
    assert single.names == ("a", "b") and not single.rates


def test_the_baseline_may_name_an_experiment_or_one_of_its_runs(load):
    assert load("baseline: b\n" + SWEEP).baseline == "b-lr2e-3"
    named = load("baseline: b-lr4e-3\n" + SWEEP)
    assert named.baseline == "b-lr4e-3"
    assert {run.baseline for run in named.runs} == {"b-lr4e-3"}
    with pytest.raises(ValueError, match="baseline: found 'b-lr3e-3'.*did you mean"):
        load("baseline: b-lr3e-3\n" + SWEEP)


def test_the_nearest_statement_counts(load):
    own = SWEEP.replace("{weight_decay: 0.2}", "{weight_decay: 0.2, learning_rate: [1e-3, 8e-3]}")
    assert load(own).rates["b"] == ("b-lr1e-3", "b-lr8e-3")
    assert load(own).run("b-lr8e-3", 0).training.weight_decay == 0.2
    one = load(SWEEP.replace("{weight_decay: 0.2}", "{learning_rate: 1e-3}"))
    assert one.names == ("a-lr2e-3", "a-lr4e-3", "a-lr1.6e-2", "b")
    assert one.run("b", 0).training.learning_rate == 1e-3
    assert load(own, "training.learning_rate=5e-3").names == ("a", "b")
    forced = load(own, "training.learning_rate=[5e-3, 6e-3]", "training.z_loss=0")
    assert forced.names == ("a-lr5e-3", "a-lr6e-3", "b-lr5e-3", "b-lr6e-3")
    assert {run.training.z_loss for run in forced.runs} == {0.0}


@pytest.mark.parametrize(
    ("list_", "says"),
    [
        ("[]", "expected one rate, or a list of different ones"),
        ("[1e-3, 0.001]", "expected one rate, or a list of different ones"),
        ("[1e-3, 2]", "found 2, expected a finite number: a rate above 0, at most 1"),
        ("[1e-3, true]", "found True"),
        ("[1e-3, [2e-3]]", "found \\[0.002\\]"),
    ],
)
def test_bad_lists_are_refused_where_they_stand(load, list_, says):
    with pytest.raises(ValueError, match=rf"sweep.yaml: training.learning_rate: .*{says}"):
        load(SWEEP.replace("[2e-3, 4e-3, 0.016]", list_))
    with pytest.raises(ValueError, match=rf"--set training.learning_rate: .*{says}"):
        load(SWEEP, f"training.learning_rate={list_}")
    with pytest.raises(ValueError, match=r"experiments.b.training.learning_rate: "):
        load(SWEEP.replace("{weight_decay: 0.2}", f"{{learning_rate: {list_}}}"))


def test_names_that_clash_with_a_run_of_a_list_are_refused(load):
    clash = "  - {name: A-lr2e-3, training: {learning_rate: 1e-3}}\n  - {name: b,"
    with pytest.raises(ValueError, match="'A-lr2e-3', which clashes"):
        load(SWEEP.replace("  - {name: b,", clash))


def test_a_list_of_rates_has_no_kill_rule(load):
    assert {run.kill_rule for run in load(SWEEP, phase="rank").runs} == {None}
    assert load(SWEEP.replace("[2e-3, 4e-3, 0.016]", "4e-3"), phase="rank").runs[0].kill_rule
    for text, overrides in ((SWEEP + "kill_rule: {}\n", ()), (SWEEP, ("kill_rule.margin_ppl=1",))):
        with pytest.raises(ValueError, match="kill_rule: found a kill rule beside a list"):
            load(text, *overrides)


def test_a_rule_that_only_records_may_stand_beside_a_list(load):
    recorded = load(SWEEP, "kill_rule.action=record", phase="rank")
    assert [run.kill_rule and run.kill_rule.action for run in recorded.runs] == ["record"] * 6


def test_exp_names_an_experiment_or_one_of_its_runs(tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP, encoding="utf-8")
    sweep = load_sweep(path)
    assert [r.run_name for r in sweep.chosen(["b"], [0])] == [
        "b-lr2e-3", "b-lr4e-3", "b-lr1.6e-2",
    ]  # fmt: skip
    assert [r.run_name for r in sweep.chosen(["b-lr4e-3", "a-lr2e-3"], [1])] == [
        "a-lr2e-3-seed1", "b-lr4e-3-seed1",
    ]  # fmt: skip
    assert len(sweep.chosen(["all"], [0, 1])) == len(sweep.chosen(["b", "all"], [0, 1])) == 12
    assert len(sweep.chosen(["b", "b-lr4e-3"], None)) == 3
    assert main(["--config", str(path), "--exp", "c", "--dry_run"]) == 78
    assert "no experiment named 'c'" in capsys.readouterr().err
    assert main(["--config", str(path), "--exp", "b", "--dry_run"]) == 0
