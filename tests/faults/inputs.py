"""F8: hypothesis over whole experiment files and one-key mutations: shapes or one sentence that
names the key; never a traceback, never a directory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import random
import shutil
import traceback
from collections.abc import Iterator
from typing import Any

import hypothesis
import yaml
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from tests.faults.bench import EXPERIMENT, Bench, Tally, tally

BAD_INPUT = 78
NONSENSE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    "x",
    "",
    [],
    {},
    [1],
    float("inf"),
    float("nan"),
    10**30,
    "\x00é",
)


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    files, mutations = bench.count(2000, 20), bench.count(500, 40)
    with tally(tallies, "F8", f"{files} experiment files from hypothesis") as line:
        any_file(bench, line, files)
    with tally(tallies, "F8", f"{mutations} one-key mutations of a good file") as line:
        draw = bench.draw("F8")
        for number, mutation in zip(range(mutations), endless(draw), strict=False):
            line.add(refused(bench, mutation), trial=f"{number} {mutation.says}")
    return tallies


def call(arguments: list[str]) -> tuple[int, str]:
    """(exit code, stderr) of the program in this process; a traceback is exit 70."""
    import run_experiment

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_experiment.main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 70
        except Exception:
            err.write(traceback.format_exc())
            code = 70
    return code, err.getvalue()


# --------------------------------------------------------------------------- any experiment file


def sections() -> dict[str, type]:
    from src.spec import config

    return {
        "model": config.ModelRequest,
        "training": config.TrainingConfig,
        "data": config.DataConfig,
        "evaluation": config.EvaluationConfig,
        "kill_rule": config.KillRule,
    }


def values(kind: str) -> st.SearchStrategy[Any]:
    """Mostly values of the right type, over the whole range and beyond; sometimes nonsense."""
    by_kind: dict[str, st.SearchStrategy[Any]] = {
        "int": st.one_of(
            st.integers(1, 64), st.integers(-2, 20_000), st.integers(10**5, 10**9), st.integers()
        ),
        "float": st.one_of(st.floats(0, 10), st.floats(), st.integers(-1, 100)),
        "bool": st.booleans(),
        "str": st.one_of(
            st.sampled_from(["depth", "attention", "auto", "fp32", "bf16", "on", "nowhere"]),
            st.text(max_size=8),
        ),
        "tuple[str, ...]": st.lists(st.sampled_from(["perplexity", "smallbench_accuracy", "x"])),
    }
    right = by_kind[kind.removesuffix(" | None")]
    if kind.endswith(" | None"):
        right = st.one_of(st.none(), right)
    return st.one_of(right, right, right, right, st.sampled_from(NONSENSE))


def section(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    optional = {spec.name: values(str(spec.type)) for spec in dataclasses.fields(kind)}
    return st.fixed_dictionaries({}, optional=optional).map(
        lambda keys: dict(list(keys.items())[: 1 + len(keys) // 4])  # few at a time
    )


def files() -> st.SearchStrategy[dict[str, Any]]:
    names = st.one_of(st.sampled_from(["emb35", "EMB35", "glu4x", "a-b_c.d"]), st.text(max_size=10))
    model = section(sections()["model"])
    experiment = st.builds(
        lambda name, own, training: {"name": name, **own, **training},
        names,
        model,
        st.one_of(st.just({}), st.builds(dict, training=section(sections()["training"]))),
    )
    body = st.fixed_dictionaries(
        {"experiments": st.lists(experiment, min_size=1, max_size=3)},
        optional={
            **{name: section(kind) for name, kind in sections().items()},
            "seeds": st.one_of(st.just([0]), st.lists(st.integers(-1, 2**32), max_size=3)),
            "baseline": names,
        },
    )
    return st.one_of(sound(), sound(), body, st.dictionaries(st.text(max_size=5), st.text()))


def sound() -> st.SearchStrategy[dict[str, Any]]:
    """Files whose every value is in its range: most are accepted, the rest cannot be met."""
    keys = {
        "total_params": st.integers(200_000, 100_000_000),
        "vocab_size": st.integers(257, 64_000),
        "embedding_ratio": st.floats(0.02, 0.7),
        "glu_expansion": st.floats(0.5, 8),
        "tie_embeddings": st.booleans(),
        "allocate": st.sampled_from(["depth", "attention"]),
        "qk_norm": st.booleans(),
    }
    model = st.fixed_dictionaries({}, optional=keys)
    training = st.fixed_dictionaries(
        {},
        optional={
            "tokens": st.integers(10**5, 10**8),
            "batch_size": st.integers(1, 256),
            "seq_len": st.integers(2, 512),
            "learning_rate": st.floats(1e-5, 0.1),
            "warmup_fraction": st.floats(0, 0.5),
        },
    )
    experiments = st.lists(model, min_size=1, max_size=3).map(
        lambda models: [{"name": f"experiment{i}", **own} for i, own in enumerate(models)]
    )
    return st.fixed_dictionaries({"model": model, "training": training, "experiments": experiments})


def any_file(bench: Bench, line: Tally, number: int) -> None:
    """`--dry_run` accepts or refuses; without it the data are missing, so a good one is refused."""
    place = bench.logs("F8", "files")
    path, logs = place / "any.yaml", place / "never"

    @hypothesis.seed(bench.seed)
    @hypothesis.settings(
        max_examples=number, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @hypothesis.given(files())
    def attempt(content: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        shared = ["--config", str(path), "--log_dir", str(logs)]
        code, err = call([*shared, "--dry_run"])
        problems = sentence(code, err, allowed=(0, BAD_INPUT))
        if code == 0 and not problems:
            missing = ["--set", "data.dir=nowhere", "--device", "cpu"]
            code, err = call([*shared, "--exp", "all", *missing])
            problems = sentence(code, err, allowed=(BAD_INPUT,))
            accepted.append(1)
        if logs.exists():
            problems.append("left a directory behind")
            shutil.rmtree(logs)
        line.add(problems, trial=str(content)[:300])

    accepted: list[int] = []
    attempt()
    line.notes.append(f"{len(accepted)} accepted, the others refused in one sentence")


def sentence(code: int, err: str, allowed: tuple[int, ...]) -> list[str]:
    """A refusal says something, once, without a traceback."""
    if code not in allowed or "Traceback" in err:
        return [f"exit {code}: {err[-600:]}"]
    if code == BAD_INPUT and not err.strip():
        return ["refused without a word"]
    return []


# ----------------------------------------------------------------------------- one-key mutations


@dataclasses.dataclass
class Mutation:
    """`text`, a file with one thing wrong, and what the refusal must name."""

    says: str
    text: str
    names: tuple[str, ...]


GOOD: dict[str, Any] = {
    "model": {"total_params": 10_000_000, "vocab_size": 16_000, "embedding_ratio": 0.35},
    "training": {"tokens": 1_000_000, "batch_size": 16, "seq_len": 64},
    "data": {"dir": "nowhere"},
    "evaluation": {"metrics": ["perplexity"]},
    "experiments": [{"name": EXPERIMENT}, {"name": "emb20", "embedding_ratio": 0.2}],
}


def endless(draw: random.Random) -> Iterator[Mutation]:
    makers = (misspelt, wrong_type, wrong_type, out_of_range, out_of_range, doubled, structural)
    while True:
        yield draw.choice(makers)(draw)


def _spec(draw: random.Random) -> tuple[str, dataclasses.Field[Any]]:
    name, kind = draw.choice(list(sections().items()))
    return name, draw.choice(dataclasses.fields(kind))


def _with(place: str, key: str, value: Any) -> str:
    content = copy.deepcopy(GOOD)
    content.setdefault(place, {})[key] = value
    return yaml.safe_dump(content, allow_unicode=True)


def misspelt(draw: random.Random) -> Mutation:
    """A letter of a key lost, doubled or swapped: the nearest valid key is offered."""
    place, spec = _spec(draw)
    at = draw.randrange(len(spec.name) - 1)
    name = spec.name
    wrong = draw.choice(
        [name[:at] + name[at + 1 :], name[:at] + name[at] * 2 + name[at + 1 :], name.upper()]
    )
    known = {field.name for field in dataclasses.fields(sections()[place])}
    if wrong in known or not wrong:
        wrong = f"{name}x"
    return Mutation(f"{place}.{wrong}", _with(place, wrong, 1), (wrong, "unknown key", "expected"))


WRONG_TYPES: dict[str, tuple[Any, ...]] = {
    "int": ("many", 1.5, True, [1], {"a": 1}, float("nan"), float("inf"), "1e6"),
    "float": ("much", True, [0.1], {}, float("nan"), float("-inf"), "3e-4x"),
    "bool": (0, 1, "yes", "no", [True], 1.0),
    "str": (1, True, 0.5, [], {}, "", None),
    "tuple[str, ...]": ("perplexity", 1, [1], {"perplexity": 1}, [["perplexity"]], True, None),
}


def wrong_type(draw: random.Random) -> Mutation:
    place, spec = _spec(draw)
    kind = str(spec.type)
    bad = draw.choice(WRONG_TYPES[kind.removesuffix(" | None")])
    if bad is None and kind.endswith(" | None"):
        bad = []
    text = _with(place, spec.name, bad)
    return Mutation(f"{place}.{spec.name}={bad!r}", text, (spec.name, "found", "expected"))


def out_of_range(draw: random.Random) -> Mutation:
    """A value of the right type that the key's own rule excludes."""
    while True:
        place, spec = _spec(draw)
        pool = {
            "int": (0, -1, -(10**12), 2**40, 1, 3),
            "float": (0.0, -1.0, -1e300, 1e300, 101.0),
            "str": ("depht", "fp64", "maybe"),
            "tuple[str, ...]": ([], ["perplexety"]),
        }.get(str(spec.type).removesuffix(" | None"), ())
        bad = [value for value in pool if not spec.metadata.get("ok", lambda _: True)(value)]
        if bad:
            value = draw.choice(bad)
            text = _with(place, spec.name, value)
            names = (spec.name, "found", "expected")
            return Mutation(f"{place}.{spec.name}={value!r}", text, names)


def doubled(draw: random.Random) -> Mutation:
    """A key that is there twice, which YAML forgives and we do not."""
    lines = yaml.safe_dump(GOOD, sort_keys=False).splitlines()
    keyed = [i for i, text in enumerate(lines) if ":" in text and not text.lstrip().startswith("-")]
    at = draw.choice([i for i in keyed if not lines[i].rstrip().endswith(":")])
    key = lines[at].strip().partition(":")[0]
    return Mutation(
        f"{key} twice", "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]]), (key, "twice")
    )


def structural(draw: random.Random) -> Mutation:
    """What is wrong is not one value but how values fit together."""
    name = draw.choice(["..", "a/b", "-x", "", "x" * 65, "a b", 7, None, "é"])
    options: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        ("name", {"experiments": [{"name": name}]}, ("name", "found", "expected")),
        ("clash", {"experiments": [{"name": "a"}, {"name": "A"}]}, ("name", "case")),
        ("none", {"experiments": []}, ("experiments", "expected")),
        ("baseline", {"baseline": "emb36"}, ("baseline", "expected")),
        ("seeds", {"seeds": draw.choice([[], [0, 0], [-1], "0", [1.5]])}, ("seeds", "expected")),
        ("warm-up", {"training": {"tokens": 2048, "batch_size": 16, "seq_len": 64,
                                  "warmup_fraction": 0.99}}, ("warmup_fraction", "expected")),
        ("one step", {"training": {"tokens": 100, "batch_size": 16, "seq_len": 64}},
         ("tokens", "expected")),
        ("micro-batch", {"training": {"batch_size": 16, "micro_batch": 5}},
         ("micro_batch", "expected")),
        ("budget", {"model": {"total_params": 100_000, "vocab_size": 64_000}},
         ("total_params", "No shape comes near")),
        ("missing data", {}, ("data.dir", "preprocess_lm.py")),
    ]  # fmt: skip
    says, change, names = draw.choice(options)
    text = yaml.safe_dump({**copy.deepcopy(GOOD), **change}, allow_unicode=True)
    return Mutation(f"{says} {change}", text, names)


def refused(bench: Bench, mutation: Mutation) -> list[str]:
    """Exit 78, the key and the file named, nothing written."""
    place = bench.work / "logs" / "F8"
    place.mkdir(parents=True, exist_ok=True)
    path, logs = place / "mutated.yaml", place / "never"
    path.write_text(mutation.text, encoding="utf-8")
    code, err = call(
        ["--config", str(path), "--exp", "all", "--device", "cpu", "--log_dir", str(logs)]
    )
    problems = sentence(code, err, allowed=(BAD_INPUT,))
    missing = [name for name in mutation.names if name not in err]
    if missing and not problems:
        problems.append(f"does not name {missing}: {err[-400:]}")
    if not problems and path.name not in err and "nowhere" not in err:
        problems.append(f"does not name the file: {err[-400:]}")
    if logs.exists():
        problems.append("left a directory behind")
        shutil.rmtree(logs)
    return problems
