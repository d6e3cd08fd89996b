"""What an experiment file may not say: every refusal names file, key, found and expected."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.spec.config import load_sweep
from tests.spec import EMBED_RATIO

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
    paths = []
    for key, value in items:
        paths.append((*path, key))
        if isinstance(value, dict | list):
            paths += places(value, (*path, key))
    return paths


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
