"""The experiment file: what is accepted, and what follows from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from src.spec import config as cfg
from src.spec.config import KillRule, load_sweep
from src.spec.strict_yaml import parse_yaml
from tests.spec import EMBED_RATIO, GLU_EXPANSION


def test_the_prd_embedding_sweep_is_accepted_as_it_is(load):
    sweep = load(EMBED_RATIO)
    assert sweep.names == ("emb35", "emb25", "emb45")
    assert sweep.baseline == "emb35" and sweep.seeds == (0,)
    assert [run.model.embedding_ratio for run in sweep.runs] == [0.35, 0.25, 0.45]
    for run in sweep.runs:
        assert run.model.total_params == 10_000_000 and run.model.vocab_size == 16_000
        assert run.model.glu_expansion == 8 / 3 and run.model.tie_embeddings
        assert run.training.tokens == 50_000_000 and run.training.batch_size == 256
        assert run.evaluation.metrics == ("perplexity", "smallbench_accuracy")
        assert run.kill_rule is None


def test_the_prd_glu_sweep_is_accepted_as_it_is(load):
    sweep = load(GLU_EXPANSION)
    assert [run.model.glu_expansion for run in sweep.runs] == [2.0, 2.66, 3.0, 4.0]
    assert {run.model.embedding_ratio for run in sweep.runs} == {0.35}
    assert sweep.baseline == "glu2x"  # the first, where none is named


def test_the_shipped_sweeps_ask_what_the_prd_asks(load):
    configs = Path(cfg.__file__).resolve().parents[2] / "configs"
    for name, text, baseline in (
        ("embed_ratio.yaml", EMBED_RATIO, "emb35"),
        ("glu_expansion.yaml", GLU_EXPANSION, "glu4x"),
    ):
        shipped, printed = load_sweep(configs / name), load(text)
        assert shipped.baseline == baseline
        assert [dataclasses.replace(run, baseline="") for run in shipped.runs] == [
            dataclasses.replace(run, baseline="") for run in printed.runs
        ]


def test_the_step_arithmetic_of_the_prd(load):
    full, rank = (load(EMBED_RATIO, phase=phase).runs[0].training for phase in cfg.PHASES[::-1])
    assert full.step_tokens == 32_768 and full.steps == 1_526 and rank.steps == 153
    assert full.warmup_steps == 77 and full.eval_every_steps == 76
    assert full.dev_token_budget == 131_072 and rank.dev_token_budget == 50_000


@pytest.mark.parametrize(
    ("written", "value"),
    [("3e-4", 3e-4), ("1E-3", 1e-3), ("4.e-3", 4e-3), (".5", 0.5), ("1", 1.0), ("0.00_1", 0.001)],
)
def test_numbers_that_yaml_1_1_reads_as_text(load, written, value):
    text = EMBED_RATIO + "  # evaluation\n\ndata: {dir: 010}\nseeds: [3]\n"
    run = load(text, f"training.learning_rate={written}").runs[0]
    assert run.training.learning_rate == value
    assert run.data.dir == "010"  # text, not the octal 8


def test_layers_file_then_experiment_then_set(load):
    text = EMBED_RATIO
    for key, more in (
        ("  batch_size: 256", "  learning_rate: 1e-3"),
        ("embedding_ratio: 0.25", "    training: {tokens: 5_000_000}"),
        ("  vocab_size: 16_000", "  glu_expansion: 3"),
    ):
        text = text.replace(key, f"{key}\n{more}")
    first, second, _ = load(text).runs
    assert (first.training.tokens, second.training.tokens) == (50_000_000, 5_000_000)
    assert second.training.learning_rate == 1e-3 and second.model.glu_expansion == 3.0
    forced = load(text, "training.tokens=1_000_000", "model.embedding_ratio=0.3").runs
    assert {run.training.tokens for run in forced} == {1_000_000}
    assert {run.model.embedding_ratio for run in forced} == {0.3}
    last = load(text, "training.tokens=1_000_000", "training.tokens=2_000_000").runs[0]
    assert last.training.tokens == 2_000_000


def test_share_defaults_unless_a_width_decides_it(load):
    assert load(GLU_EXPANSION, "model.embedding_dim=128").runs[0].model.embedding_ratio is None
    assert load(GLU_EXPANSION, "model.d_model=256").runs[0].model.embedding_ratio is None
    both = load(GLU_EXPANSION, "model.embedding_dim=128", "model.embedding_ratio=0.2").runs[0]
    assert both.model.embedding_ratio == 0.2 and both.model.embedding_dim == 128
    assert load(GLU_EXPANSION, "model.embedding_ratio=null").runs[0].model.embedding_ratio == 0.35


def test_the_kill_rule_is_on_where_stated_or_ranking(load):
    assert load(EMBED_RATIO).runs[0].kill_rule is None
    assert load(EMBED_RATIO + "kill_rule:\n").runs[0].kill_rule is None
    default = KillRule()
    assert (default.margin_ppl, default.window_tokens) == (0.5, 1_000_000)
    assert load(EMBED_RATIO + "kill_rule: {}\n").runs[0].kill_rule == default
    assert load(EMBED_RATIO, phase="rank").runs[0].kill_rule == default
    stated = load(EMBED_RATIO + "kill_rule: {grace_tokens: 0}\n").runs[0].kill_rule
    assert stated is not None and stated.grace(50_000_000) == 0
    assert default.grace(50_000_000) == 15_000_000
    assert default.action == "stop"  # the PRD's
    record = load(EMBED_RATIO, "kill_rule.action=record").runs[0].kill_rule
    assert record == KillRule(action="record")  # in every phase, with the rule's defaults


def test_ranking_runs_may_have_a_batch_of_their_own(load):
    stated = EMBED_RATIO.replace("batch_size: 256", "batch_size: 256\n  ranking_batch_size: 64")
    batches = [load(stated, phase=phase).runs[0].training.batch_size for phase in cfg.PHASES]
    assert batches == [64, 256]
    assert load(stated, phase="rank").runs[0].training.steps == 611
    plain = load(EMBED_RATIO, phase="rank").runs[0].training
    assert (plain.batch_size, plain.steps) == (256, 153)
    with pytest.raises(ValueError, match="micro_batch: found 128, expected a divisor of .* 64"):
        load(stated, "training.micro_batch=128", phase="rank")


def test_young_keys_leave_the_digest_of_older_runs_alone(load):
    """Runs that were begun or published before these keys are gone on with."""

    def digest(text: str, *overrides: str, phase: str = "rank") -> str:
        run = load(text, *overrides, phase=phase).run("emb25", 1)
        rule = None if run.kill_rule is None else cfg.to_dict(run.kill_rule)
        return cfg.digest({"training": cfg.to_dict(run.training), "kill_rule": rule})

    plain = digest(EMBED_RATIO)
    run = load(EMBED_RATIO, phase="rank").run("emb25", 1)
    assert run.kill_rule is not None
    before = {"training": cfg.to_dict(run.training), "kill_rule": cfg.to_dict(run.kill_rule)}
    for section, name in (("training", "ranking_batch_size"), ("kill_rule", "action")):
        del before[section][name]
    assert digest(EMBED_RATIO) == cfg.digest(before)
    assert digest(EMBED_RATIO, "kill_rule.action=record") != plain
    own = "training.ranking_batch_size=64"
    assert digest(EMBED_RATIO, own) == digest(EMBED_RATIO, "training.batch_size=64") != plain
    assert digest(EMBED_RATIO, own, phase="full") == digest(EMBED_RATIO, phase="full")


def test_seeds_and_run_names(load):
    sweep = load(EMBED_RATIO + "seeds: [0, 1, 7]\n")
    assert sweep.seeds == (0, 1, 7)
    run = sweep.run("emb25", 7)
    assert run.run_name == "emb25-seed7" and run.baseline_run_name == "emb35-seed7"
    assert (run.training.init_seed, run.training.data_seed) == (7, 7)
    assert sweep.run("emb25", 0).run_name == "emb25"
    fixed = load(EMBED_RATIO, "training.data_seed=3").run("emb25", 7)
    assert (fixed.training.init_seed, fixed.training.data_seed) == (7, 3)
    rank = load(EMBED_RATIO, phase="rank")
    assert rank.run("emb25", 0).run_name == "emb25-rank"
    assert rank.run("emb25", 2).run_name == "emb25-rank-seed2"
    assert rank.run("emb25", 2).training.tokens == 5_000_000
    with pytest.raises(ValueError, match=r"no experiment named 'emb26'.*did you mean 'emb25'"):
        sweep.run("emb26", 0)


def test_paths_follow_the_config(load):
    run = load(EMBED_RATIO, "data.dir=some/where").runs[0]
    assert run.token_dir == Path("some/where/v16000")
    assert run.smallbench_tasks.name == "smallbench.yaml" and run.smallbench_tasks.is_file()
    assert load(EMBED_RATIO, "evaluation.smallbench_tasks=x.yaml").runs[0].smallbench_tasks == Path(
        "x.yaml"
    )


def test_the_digest_ignores_cosmetic_keys_alone(load):
    def digest(*overrides: str) -> str:
        return cfg.digest(cfg.to_dict(load(EMBED_RATIO, *overrides).runs[0]))

    assert digest() == digest("training.checkpoint_minutes=1", "training.checkpoint_every_steps=5")
    assert digest() != digest("training.learning_rate=1e-3")
    assert digest() != digest("model.glu_expansion=3")


def test_merge_keys_are_read_as_yaml_defines_them():
    merged = "x: &x {a: 1, b: 1}\ny: &y {b: 2}\nz: {<<: [*y, *x], c: 3}\nu: {<<: *x, a: 4}"
    content = parse_yaml(merged, "a file")
    assert content["z"] == {"a": 1, "b": 2, "c": 3} and content["u"] == {"a": 4, "b": 1}


def test_a_name_that_only_begins_like_a_missing_value_is_fine(load):
    assert load(EMBED_RATIO.replace("name: emb25", "name: null1")).names[1] == "null1"


def test_ranking_runs_measure_dev_perplexity_unless_told_otherwise(tmp_path: Path) -> None:
    stated = "evaluation: {metrics: [perplexity, smallbench_accuracy], outside_dir: data/other}\n"
    path = tmp_path / "sweep.yaml"
    path.write_text("experiments: [{name: a}]\n" + stated)
    full = load_sweep(path).run("a", 0).evaluation
    assert full.test and full.latency and full.outside_dir and len(full.metrics) == 2
    rank = load_sweep(path, phase="rank").run("a", 0).evaluation
    assert (rank.test, rank.latency, rank.outside_dir) == (False, False, None)
    assert rank.metrics == ("perplexity",)
    forced = load_sweep(path, ["evaluation.latency=true"], "rank").run("a", 0).evaluation
    assert forced.latency and not forced.test
