"""The experiment file: strict YAML into frozen dataclasses with units. Imports no torch.

One table of defaults: the dataclasses below. Every mistake a user can make raises `ValueError`
with one sentence that names file, key, value found, value expected and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from src.spec import names
from src.spec.kill_rule import KillRule
from src.spec.names import run_name
from src.spec.rates import spelled
from src.spec.strict_yaml import build, key, known_keys, nearest, one_of, parse_yaml, read_yaml
from src.spec.training_config import TrainingConfig

PHASES = ("rank", "full")
# What a ranking run measures, whatever the file says for full runs: dev perplexity decides, and
# test is scored once, at the end. On a GPU the rest would take longer than 5M tokens of training.
RANKING = {
    "metrics": ["perplexity"],
    "test": False,
    "outside_dir": None,
    "blimp_full": False,
    "latency": False,
}
SMALLBENCH_TASKS = Path(__file__).resolve().parents[2] / "configs" / "smallbench.yaml"
METRICS = ("perplexity", "smallbench_accuracy")
DEFAULT_SHARE = 0.35
# Keys that may change between a run and its resumption: none of them changes the result. The batch
# of ranking runs is in `batch_size` of every ranking run.
COSMETIC = (
    "training.checkpoint_minutes",
    "training.checkpoint_every_steps",
    "training.ranking_batch_size",
)
# Keys that are younger than published runs: at this value they say what those runs did.
LATER = {"kill_rule.action": "stop"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Final integers of one model; made by `src.spec.allocation`, read by `src.models`."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    head_dim: int
    d_ff: int
    embedding_dim: int | None = None  # None: table V x d_model; else V x E and E x d_model
    tie_embeddings: bool = True
    qk_norm: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """What the YAML asks for; the allocator answers with a `ModelConfig`."""

    total_params: int = key(
        10_000_000, "a number of parameters from 1 to 10^10", lambda v: 0 < v <= 10**10
    )
    vocab_size: int = key(
        16_000, "a number of tokens from 2 to 10 million", lambda v: 2 <= v <= 10**7
    )
    # None only where embedding_dim is set: then V x E decides the share by itself.
    embedding_ratio: float | None = key(None, "a share between 0 and 1", lambda v: 0 < v < 1)
    glu_expansion: float = key(8 / 3, "a factor above 0, at most 64", lambda v: 0 < v <= 64)
    tie_embeddings: bool = key(True, "true or false")
    embedding_dim: int | None = key(None, "a width above 0, or null", lambda v: v > 0)
    # What takes the slack where the GLU expansion changes: layers, or heads at one depth.
    allocate: str = one_of("depth", "depth", "attention")
    # RMSNorm of queries and keys before their product.
    qk_norm: bool = key(True, "true or false")
    n_layers: int | None = key(None, "a number of layers above 0, or null", lambda v: v > 0)
    d_model: int | None = key(
        None, "a multiple of 8 above 0, or null", lambda v: v > 0 and v % 8 == 0
    )
    n_heads: int | None = key(None, "a number of heads above 0, or null", lambda v: v > 0)
    head_dim: int | None = key(None, "16, 32, 64, 128, or null", lambda v: v in (16, 32, 64, 128))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    dir: str = key("data/lm_tokenized", "a directory made by scripts/preprocess_lm.py")
    # The first so many tokens of train, repeated: what do 20 epochs cost against fresh tokens?
    train_tokens: int | None = key(None, "tokens above 0, or null for all", lambda v: v > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    metrics: tuple[str, ...] = key(
        METRICS, "a list of " + ", ".join(METRICS), lambda v: set(v) <= set(METRICS) and v
    )
    smallbench_dir: str = key("data/smallbench", "a directory")
    smallbench_tasks: str | None = key(None, "a task list, or null for configs/smallbench.yaml")
    smallbench_limit: int | None = key(None, "items a task above 0, or null", lambda v: v > 0)
    # The same model untrained on the same items: what the tasks give away for nothing.
    smallbench_untrained: bool = key(True, "true or false")
    # Every row of the list's BLiMP tasks (67,000), in runs at the full budget.
    blimp_full: bool = key(False, "true or false")
    leakage: str | None = key(None, "a file of scripts/check_leakage.py, or null to look for it")
    test: bool = key(True, "true or false")
    # None: the whole of dev and test; else the first documents with so many tokens.
    perplexity_tokens: int | None = key(None, "tokens above 0, or null", lambda v: v > 0)
    # A corpus directory whose validation and test are scored too, with the run's own tokenizer.
    outside_dir: str | None = key(None, "a directory made by scripts/download_wikitext.py, or null")
    latency: bool = key(True, "true or false")
    latency_repeats: int = key(200, "repeats above 1", lambda v: v > 1)
    latency_warmup: int = key(50, "repeats of at least 0", lambda v: v >= 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: one experiment of a sweep, one seed, one phase. Nothing here is an integer of
    the model; those come from the allocator and are saved beside it."""

    experiment: str
    baseline: str
    seed: int
    phase: str
    model: ModelRequest
    training: TrainingConfig
    data: DataConfig
    evaluation: EvaluationConfig
    kill_rule: KillRule | None

    @property
    def run_name(self) -> str:
        return run_name(self.experiment, self.phase, self.seed)

    @property
    def baseline_run_name(self) -> str:
        return run_name(self.baseline, self.phase, self.seed)

    @property
    def may_be_killed(self) -> bool:
        """Whether it has a kill rule that stops it, not one that only records."""
        return self.kill_rule is not None and self.kill_rule.action == "stop"

    @property
    def smallbench_tasks(self) -> Path:
        """The task list asked for, or the shipped one."""
        path = self.evaluation.smallbench_tasks
        return SMALLBENCH_TASKS if path is None else Path(path)

    @property
    def token_dir(self) -> Path:
        return Path(self.data.dir) / f"v{self.model.vocab_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A validated experiment file; `runs` are its experiments in file order, not yet at a seed."""

    file: Path
    baseline: str
    seeds: tuple[int, ...]
    phase: str
    states_kill_rule: bool  # in the file or by --set, not by the phase's default
    runs: tuple[RunConfig, ...]
    # Runs of each experiment that asked for a list of learning rates.
    rates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(run.experiment for run in self.runs)

    def named(self, name: str) -> tuple[str, ...]:
        """The experiments that `name` stands for: itself, or its runs at each learning rate."""
        return self.rates.get(name, (name,))

    def run(self, name: str, seed: int) -> RunConfig:
        """The run of `name` at `seed`, which initialisation and data order follow where the file
        states no seed for them; raises ValueError naming the nearest experiment."""
        if name not in self.names:
            raise ValueError(
                f"{self.file}: experiments: found no experiment named {name!r}, expected one of "
                f"{', '.join(self.names)}{nearest(name, self.names)}"
            )
        run = self.runs[self.names.index(name)]
        stated = {key: getattr(run.training, key) for key in ("init_seed", "data_seed")}
        seeds: dict[str, Any] = {k: seed if v is None else v for k, v in stated.items()}
        return replace(run, seed=seed, training=replace(run.training, **seeds))

    def chosen(self, names: Sequence[str], seeds: Sequence[int] | None) -> list[RunConfig]:
        """The asked runs: seeds within experiments, the baseline first (others are judged by it).

        names: experiments, or "all" among them; seeds: None for the file's. ValueError for what is
        not there.
        """
        for seed in seeds or ():
            if not 0 <= seed < 2**31:
                raise ValueError(f"--seed: found {seed}, expected a seed from 0 to 2^31 - 1")
        selected = self.names if "all" in names else names
        experiments = list(dict.fromkeys(run for name in selected for run in self.named(name)))
        experiments.sort(key=lambda name: name != self.baseline)
        return [self.run(name, seed) for name in experiments for seed in (seeds or self.seeds)]


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of this module as plain, JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def digest(resolved: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved configuration (nested dicts) without its cosmetic keys."""
    kept = json.loads(json.dumps(resolved))
    for dotted in (*COSMETIC, *LATER):
        section, name = dotted.split(".")
        values = kept.get(section) or {}
        if dotted in COSMETIC or values.get(name) == LATER[dotted]:
            values.pop(name, None)
    return json_sha256(kept)


def json_sha256(content: Any) -> str:
    """Of plain values (and the dates that YAML reads), whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------------- the sweep

_SECTIONS: dict[str, type] = {
    "model": ModelRequest,
    "training": TrainingConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
    "kill_rule": KillRule,
}
_TOP_KEYS = (*_SECTIONS, "experiments", "baseline", "seeds")


def load_sweep(path: str | Path, overrides: Sequence[str] = (), phase: str = "full") -> Sweep:
    """Read an experiment file and `--set` overrides ("section.key=value") into a `Sweep`.

    Raises ValueError (one sentence) for anything a user can get wrong, a missing file included.
    """
    path = Path(path)
    return sweep_from(read_yaml(path, "an experiment file"), path, overrides, phase)


def sweep_from(raw: Any, path: Path, overrides: Sequence[str] = (), phase: str = "full") -> Sweep:
    """`load_sweep` of values that were read (or made) already; `path` names them in errors.

    Where an experiment's learning rate is a list, it has a run per rate with everything else as
    stated: `emb35` at 0.002 is `emb35-lr2e-3`.
    """
    where = f"{path}: "
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}found {raw!r}, expected a mapping with the key experiments")
    known_keys(where, raw, _TOP_KEYS)
    forced = _parse_overrides(overrides)
    runs = _experiments(where, raw, forced, phase)
    rates = {
        name: tuple(run.experiment for run in rate_runs)
        for name, rate_runs in runs.items()
        if rate_runs[0].experiment != name
    }
    all_runs = [run for rate_runs in runs.values() for run in rate_runs]
    baselines = list(dict.fromkeys([*runs, *(run.experiment for run in all_runs)]))
    baseline = raw.get("baseline", baselines[0])
    if baseline not in baselines:
        raise ValueError(
            f"{where}baseline: found {baseline!r}, expected one of the experiments "
            f"{', '.join(baselines)}{nearest(str(baseline), baselines)}"
        )
    baseline = rates.get(baseline, (baseline,))[0]  # at the first rate of its list
    states_kill_rule = raw.get("kill_rule") is not None or "kill_rule" in forced
    all_runs = [replace(run, baseline=baseline) for run in all_runs]
    return Sweep(
        file=path,
        baseline=baseline,
        seeds=_seeds(where, raw.get("seeds", [0])),
        phase=phase,
        states_kill_rule=states_kill_rule,
        runs=tuple(_without_kill_rule(where, all_runs, states_kill_rule) if rates else all_runs),
        rates=rates,
    )


def _without_kill_rule(
    where: str, runs: list[RunConfig], states_kill_rule: bool
) -> list[RunConfig]:
    """A rate far off is a point that the comparison of rates needs: nothing stops it."""
    if not states_kill_rule:
        return [replace(run, kill_rule=None) for run in runs]
    if all(run.kill_rule is not None and run.kill_rule.action == "record" for run in runs):
        return runs
    raise ValueError(
        f"{where}kill_rule: found a kill rule beside a list of learning rates, expected none or "
        "action: record: comparing rates needs the runs at bad ones too; or state one "
        "training.learning_rate"
    )


def _parse_overrides(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    forced: dict[str, dict[str, Any]] = {}
    valid = [
        f"{section}.{spec.name}"
        for section, kind in _SECTIONS.items()
        for spec in dataclasses.fields(kind)
    ]
    for text in overrides:
        dotted, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: found {text!r}, expected key=value")
        if dotted not in valid:
            raise ValueError(
                f"--set {dotted}: found an unknown key, expected section.key such as "
                f"training.tokens{nearest(dotted, valid)}"
            )
        section, name = dotted.split(".")
        parsed = parse_yaml(value, f"--set {dotted}")
        _check_section(section, f"--set {section}.", {name: parsed})
        forced.setdefault(section, {})[name] = parsed
    return forced


def _check_section(section: str, place: str, stated: Any) -> None:
    """One layer of a section by itself, so that an error names its place."""
    rates = stated.get("learning_rate") if isinstance(stated, Mapping) else None
    if section != "training" or not isinstance(rates, list):
        build(_SECTIONS[section], place, stated)
        return
    for rate in rates:
        build(TrainingConfig, place, {**stated, "learning_rate": rate})
    if not rates or len({float(rate) for rate in rates}) != len(rates):
        raise ValueError(
            f"{place}learning_rate: found {rates!r}, expected one rate, or a list of different ones"
        )


def _experiments(
    where: str, raw: Mapping[str, Any], forced: Mapping[str, dict[str, Any]], phase: str
) -> dict[str, list[RunConfig]]:
    """Each experiment's run, or its runs at each rate of a list."""
    entries = raw.get("experiments")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}experiments: found {entries!r}, expected a list with a name each")
    runs: dict[str, list[RunConfig]] = {}
    folded: dict[str, str] = {}
    for index, entry in enumerate(entries):
        here = f"{where}experiments[{index}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{here}: found {entry!r}, expected a mapping with the key name")
        names.check(f"{here}.name", entry.get("name"))
        rate_runs = _runs(where, raw, entry, forced, phase)
        for name in dict.fromkeys([entry["name"], *(run.experiment for run in rate_runs)]):
            names.check(f"{here}.name", name)
            if name.casefold() in folded:
                raise ValueError(
                    f"{here}.name: found {name!r}, which clashes with {folded[name.casefold()]!r}; "
                    "expected names that differ by more than case"
                )
            folded[name.casefold()] = name
        runs[entry["name"]] = rate_runs
    return runs


def _seeds(where: str, seeds: Any) -> tuple[int, ...]:
    good = isinstance(seeds, list) and seeds and len(set(map(str, seeds))) == len(seeds)
    if not good or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        raise ValueError(f"{where}seeds: found {seeds!r}, expected a list of different seeds")
    return tuple(seeds)


def _runs(
    where: str,
    raw: Mapping[str, Any],
    entry: Mapping[str, Any],
    forced: Mapping[str, dict[str, Any]],
    phase: str,
) -> list[RunConfig]:
    """One experiment: file defaults, then its own keys (or the phase's), then --set."""
    name = entry["name"]
    here = f"{where}experiments.{name}."
    model_keys = [spec.name for spec in dataclasses.fields(ModelRequest)]
    if "model" in entry:
        raise ValueError(
            f"{here}model: found a section, expected the model's keys beside name, such as "
            "vocab_size: 4096"
        )
    known_keys(here, entry, ["name", *model_keys, "training"])
    own: dict[str, Any] = {"training": entry.get("training")}
    own["model"] = {key: value for key, value in entry.items() if key in model_keys}
    if phase == "rank":
        own |= {"evaluation": RANKING, "kill_rule": {}}
    stated: dict[str, dict[str, Any]] = {}
    for section in _SECTIONS:
        layers = (
            (f"{where}{section}.", raw.get(section)),
            (here if section == "model" else f"{here}{section}.", own.get(section)),
            (f"--set {section}.", forced.get(section)),
        )
        for place, layer in layers:
            if layer is not None:
                _check_section(section, place, layer)
                stated.setdefault(section, {}).update(layer)
    # PRD 6.2 leaves the share out: the default, unless a table or a width decides it.
    model = stated["model"]
    if not any(model.get(key) for key in ("embedding_ratio", "embedding_dim", "d_model")):
        model["embedding_ratio"] = DEFAULT_SHARE
    training = stated.get("training", {})
    rates = training.get("learning_rate")
    if not isinstance(rates, list):
        return [_run(where, name, stated, phase)]
    named = {f"{name}-lr{spelled(float(rate))}": {"learning_rate": rate} for rate in rates}
    return [
        _run(where, run, {**stated, "training": training | rate}, phase)
        for run, rate in named.items()
    ]


def _run(where: str, name: str, stated: Mapping[str, dict[str, Any]], phase: str) -> RunConfig:
    """The run of these sections; its baseline is not known yet."""
    built = {
        section: build(kind, f"{where}{section}.", stated.get(section, {}))
        for section, kind in _SECTIONS.items()
    }
    if "kill_rule" not in stated:
        built["kill_rule"] = None
    ranking = ""  # of the keys that decide the budget
    if phase == "rank":
        training = built["training"]
        ranking = "ranking_" if training.ranking_tokens < training.tokens else ""
        built["training"] = replace(
            training,
            tokens=min(training.tokens, training.ranking_tokens),
            batch_size=training.ranking_batch_size or training.batch_size,
        )
    built["training"].check(where, ranking)
    return RunConfig(experiment=name, baseline="", seed=0, phase=phase, **built)
