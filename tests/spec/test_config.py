"""The experiment file: what is accepted; every refusal names file, key, found and expected."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.spec import config as cfg
from src.spec.config import KillRule, ModelRequest, TrainingConfig, load_sweep
from src.spec.strict_yaml import parse_yaml

EMBED_RATIO = """\
# configs/embed_ratio.yaml
model:
  total_params: 10_000_000
  vocab_size: 16_000
experiments:
  - name: emb35
    embedding_ratio: 0.35
  - name: emb25
    embedding_ratio: 0.25
  - name: emb45
    embedding_ratio: 0.45
training:
  tokens: 50_000_000
  batch_size: 256
evaluation:
  metrics: ["perplexity", "smallbench_accuracy"]
"""
GLU_EXPANSION = """\
# configs/glu_expansion.yaml
model:
  total_params: 10_000_000
  vocab_size: 16_000
experiments:
  - name: glu2x
    glu_expansion: 2.0
  - name: glu266x
    glu_expansion: 2.66
  - name: glu3x
    glu_expansion: 3.0
  - name: glu4x
    glu_expansion: 4.0
training:
  tokens: 50_000_000
  batch_size: 256
evaluation:
  metrics: ["perplexity", "smallbench_accuracy"]
"""


@pytest.fixture
def load(tmp_path):
    """Text of an experiment file, overrides, phase -> Sweep."""

    def read(text: str | bytes, *overrides: str, phase: str = "full") -> cfg.Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_sweep(path, overrides, phase)

    return read


@pytest.fixture
def refusal(load):
    """As `load`, for what must be refused; returns the message."""

    def read(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(ValueError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return read


# -------------------------------------------------------------------------------------- accepted


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


# --------------------------------------------------------------------------------------- refused

BAD = {
    "unknown section": ("trainig: {}\n", ["trainig", "unknown key", "training"]),
    "unknown key": ("data: {dirr: x}\n", ["data.dirr", "unknown key", "did you mean 'dir'"]),
    "a section that is a list": ("data: []\n", ["data", "[]", "a mapping"]),
    "a section that is a number": ("data: 0\n", ["data", "found 0", "a mapping"]),
    "empty text": ('data: {dir: ""}\n', ["data.dir", "''", "text"]),
    "seeds not a list": ("seeds: 3\n", ["seeds", "found 3", "a list of different seeds"]),
    "equal seeds": ("seeds: [1, 1]\n", ["seeds", "[1, 1]", "different"]),
    "a negative seed": ("seeds: [-1]\n", ["seeds", "[-1]"]),
    "unknown baseline": ("baseline: emb36\n", ["baseline", "'emb36'", "did you mean 'emb35'"]),
    "a key twice": ("data: {dir: a, dir: b}\n", ["'dir'", "twice", "line 17"]),
    "a section twice": ("model: {}\n", ["'model'", "twice", "line 2", "line 17"]),
    "a key that is a number": ("3: x\n", ["line 17", "found the key 3", "a name"]),
    "not YAML": ("data: {dir: [\n", ["line 1", "not valid YAML"]),
    "a Python object": ("data: !!python/object:os.system {}\n", ["not valid YAML"]),
    "a tag and a value that do not fit": ("data: !!timestamp x\n", ["sweep.yaml", "tag"]),
}

LEVELS = 5  # ten times as many values each: a file of 30 lines that stands for 100,000
ALIASES = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, LEVELS)
)
BAD |= {
    "aliases of aliases": (ALIASES, ["111,111 values", "at most 100,000"]),
    "an alias inside of itself": ("data: &a {dir: [*a]}\n", ["line 17", "an alias inside"]),
    "a merge of no mapping": ("data: {<<: [3]}\n", ["not valid YAML", "for merging"]),
}


def test_merge_keys_are_read_as_yaml_defines_them():
    merged = "x: &x {a: 1, b: 1}\ny: &y {b: 2}\nz: {<<: [*y, *x], c: 3}\nu: {<<: *x, a: 4}"
    found = parse_yaml(merged, "a file")
    assert found["z"] == {"a": 1, "b": 2, "c": 3} and found["u"] == {"a": 4, "b": 1}


@pytest.mark.parametrize("case", BAD)
def test_bad_structure_is_refused(refusal, case):
    added, words = BAD[case]
    message = refusal(EMBED_RATIO + added)
    for word in ["sweep.yaml", *words]:
        assert word in message


BAD_VALUES = {
    "model.total_params": ["0", "-5", "1e7", "ten", "true", "null", "010", "[1]", "9" * 400],
    "model.vocab_size": ["1", "16000.0", "no"],
    "model.embedding_ratio": ["0", "1", "-0.1", ".nan", ".inf", "35%", "'0.35'", "1e400"],
    "model.glu_expansion": ["0", "65", "-.inf", "no", "false"],
    "model.tie_embeddings": ["no", "yes", "1", "null", "'true'"],
    "model.allocate": ["width", "1", "Depth"],
    "model.d_model": ["12", "0", "8.0"],
    "model.n_layers": ["0", "1.5"],
    "training.tokens": ["0", "5e7", "12:30:45", "50_000_000.0"],
    "training.batch_size": ["0", "many"],
    "training.ranking_batch_size": ["0", "64.0"],
    "training.seq_len": ["1", "0x80"],
    "training.learning_rate": ["0", "2", "nan", ".nan", "3e-4x", "1__e"],
    "training.warmup_fraction": ["1", "-0.1"],
    "training.precision": ["bf15", "32"],
    "training.threads": ["0", "4096"],
    "training.init_seed": ["-1", "2147483648"],
    "training.deterministic": ["on"],
    "evaluation.metrics": ["[]", "[accuracy]", "perplexity", "[1]"],
    "evaluation.smallbench_limit": ["0"],
    "evaluation.latency_repeats": ["1"],
    "kill_rule.margin_ppl": ["0", "-.5"],
    "kill_rule.window_tokens": ["0", "1e6"],
    "kill_rule.grace_tokens": ["-1"],
    "kill_rule.action": ["kill", "null"],
    "data.dir": ["null", "3", "''", '"a\\0b"'],
}


@pytest.mark.parametrize(
    ("key", "written"), [(key, value) for key, values in BAD_VALUES.items() for value in values]
)
def test_a_bad_value_is_refused_with_its_key(refusal, key, written):
    """In the file and with --set alike: the key, what was found, what was expected."""
    section, name = key.split(".")
    raw = yaml.safe_load(EMBED_RATIO)
    kept = {k: v for k, v in raw.get(section, {}).items() if k != name}
    lines = [f"  {k}: {v}" for k, v in kept.items()] + [f"  {name}: {written}"]
    others = {k: v for k, v in raw.items() if k != section}
    text = yaml.safe_dump(others) + "\n".join([f"{section}:", *lines]) + "\n"
    in_file = refusal(text)
    assert f"sweep.yaml: {key}: found " in in_file and ", expected " in in_file
    by_set = refusal(EMBED_RATIO, f"{key}={written}")
    assert by_set.startswith(f"--set {key}: found ") and ", expected " in by_set
    assert in_file.split("found ")[1] == by_set.split("found ")[1]


def test_a_bad_key_of_an_experiment_names_the_experiment(refusal):
    for written, says in (
        ("embeding_ratio: 0.25", "embeding_ratio: found an unknown key"),
        ("embeding_ratio: 0.25", "did you mean 'embedding_ratio'"),
        ("embedding_ratio: 25", "experiments.emb25.embedding_ratio: found 25, expected"),
        ("training: {tokens: x}", "experiments.emb25.training.tokens: found 'x', expected"),
        ("training: []", "experiments.emb25.training: found [], expected"),
    ):
        assert says in refusal(EMBED_RATIO.replace("embedding_ratio: 0.25", written))


BAD_NAMES = ["../up", "a/b", ".hidden", "-x", "", "a b", "é", "a" * 65, "x-rank", "x-seed1",
             "x\n", "3", "~"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_experiment_name_is_refused(refusal, name):
    written = name if name in ("3", "~") else yaml.safe_dump(name).splitlines()[0]
    if name == "x\n":
        written = '"x\\n"'
    message = refusal(EMBED_RATIO.replace("name: emb25", f"name: {written}"))
    assert "sweep.yaml: experiments[1].name: found " in message and ", expected " in message


@pytest.mark.parametrize("name", ["NA", "nan", "'007'", "'1e5'", "'null'", "inf", "'TRUE'"])
def test_a_name_that_readers_of_tables_retype_is_refused(refusal, name):
    assert "readers of tables" in refusal(EMBED_RATIO.replace("name: emb25", f"name: {name}"))


def test_a_name_that_only_begins_like_a_missing_value_is_fine(load):
    assert load(EMBED_RATIO.replace("name: emb25", "name: null1")).names[1] == "null1"


def test_names_that_clash_are_refused(refusal):
    same = refusal(EMBED_RATIO.replace("name: emb25", "name: emb35"))
    assert "experiments[1].name" in same and "clashes with 'emb35'" in same
    folded = refusal(EMBED_RATIO.replace("name: emb25", "name: EMB35"))
    assert "'EMB35'" in folded and "clashes with 'emb35'" in folded


@pytest.mark.parametrize("experiments", ["", "experiments: []", "experiments: {a: 1}"])
def test_no_experiments_are_refused(refusal, experiments):
    message = refusal(f"model: {{}}\n{experiments}\n")
    assert "sweep.yaml: experiments: found" in message and "expected a list" in message
    assert "expected a mapping" in refusal("experiments: [emb35]\n")


def test_all_is_no_name(refusal):
    assert "experiments[0].name: found 'all'" in refusal("experiments: [{name: all}]")


def test_a_schedule_that_does_not_fit_is_refused(refusal):
    warm = refusal(EMBED_RATIO, "training.warmup_fraction=0.9999")
    assert "training.warmup_fraction: found 0.9999" in warm and "1526 of 1526 steps" in warm
    short = refusal(EMBED_RATIO, "training.tokens=1000")
    assert "training.tokens: found 1,000" in short and "32,768" in short
    micro = refusal(EMBED_RATIO, "training.micro_batch=7")
    assert "training.micro_batch: found 7, expected a divisor of batch_size 256" in micro


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.tokens", ["'training.tokens'", "key=value"]),
        ("training.token=3", ["--set training.token", "did you mean 'training.tokens'"]),
        ("tokens=3", ["--set tokens", "unknown key", "section.key"]),
        ("training=3", ["--set training", "unknown key"]),
        ("experiments.name=x", ["--set experiments.name", "unknown key"]),
        ("training.tokens={", ["--set training.tokens", "not valid YAML"]),
        ("training.tokens=", ["--set training.tokens", "None", "a whole number"]),
        ("=3", ["unknown key"]),
    ],
)
def test_a_bad_override_is_refused(refusal, override, words):
    message = refusal(EMBED_RATIO, override)
    for word in words:
        assert word in message


def test_files_that_cannot_be_read_are_refused(refusal, tmp_path):
    assert "byte 19 is not UTF-8" in refusal(b"# configs/embed_ra\n\xff")
    for content in (b"", b"\n# nothing\n", b"[1, 2]", b"text"):
        assert "sweep.yaml: found" in refusal(content)
    assert "sweep.yaml" in refusal(b"a: \x00")
    assert "sweep.yaml" in refusal("a: " + "[" * 5_000)
    with pytest.raises(ValueError, match=r"missing\.yaml: found no such file"):
        load_sweep(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="found a directory"):
        load_sweep(tmp_path)


# ------------------------------------------------------------------------------------- mutations

SECTIONS = {"model": ModelRequest, "training": TrainingConfig, "kill_rule": KillRule}
FULL = {
    **yaml.safe_load(EMBED_RATIO),
    "baseline": "emb35",
    "seeds": [0, 1],
    "data": {"dir": "data/lm_tokenized"},
    "kill_rule": {"margin_ppl": 0.5, "window_tokens": 1_000_000, "grace_tokens": None},
}


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value below a mapping, mappings and lists included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["no", "010", "1e400", "12:30:45", "2026-11-23", ".nan", "emb35", "0.35"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(places(FULL)), value=VALUES, how=st.sampled_from(["value", "key"]))
def test_one_mutation_is_accepted_or_refused_by_name(tmp_path, place, value, how):
    """Fault plan F8: never another exception, and the key that was changed is in the message."""
    mutated = copy.deepcopy(FULL)
    parent: Any = mutated
    for step in place[:-1]:
        parent = parent[step]
    key = place[-1]
    if how == "key" and isinstance(parent, dict):
        parent[str(value)] = parent.pop(key)
        key = str(value)
    else:
        parent[key] = value
    path = tmp_path / f"sweep-{os.getpid()}.yaml"
    path.write_text(yaml.safe_dump(mutated), encoding="utf-8")
    try:
        sweep = load_sweep(path)
    except ValueError as error:
        message = str(error)
        named = key if isinstance(key, str) else place[-2]
        cousins = {"tokens": "training.", "batch_size": "training.", "name": "baseline"}
        gone = how == "key" and place[-1] in ("name", "experiments", "baseline", "tokens")
        assert path.name in message
        assert (
            named in message
            or repr(named) in message
            or cousins.get(named, "\0") in message
            or (gone and str(place[-1]) in message)
            or (gone and "training." in message)
            or re.search(r"line \d+", message)
        ), (place, value, message)
    else:
        assert sweep.runs and all(run.training.steps >= 1 for run in sweep.runs)


def test_ranking_runs_measure_dev_perplexity_unless_told_otherwise(tmp_path: Path) -> None:
    stated = "evaluation: {metrics: [perplexity, smallbench_accuracy], outside_dir: data/other}\n"
    path = tmp_path / "sweep.yaml"
    path.write_text("experiments: [{name: a}]\n" + stated)
    full = load_sweep(path).run("a", 0).evaluation
    assert full.test and full.latency and full.outside_dir and len(full.metrics) == 2
    rank = load_sweep(path, phase="rank").run("a", 0).evaluation
    assert (rank.test, rank.latency, rank.outside_dir) == (False, False, None)
    assert rank.metrics == ("perplexity",)
    told = load_sweep(path, ["evaluation.latency=true"], "rank").run("a", 0).evaluation
    assert told.latency and not told.test
