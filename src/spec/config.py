"""The experiment file: strict YAML into frozen dataclasses with units. Imports no torch.

One table of defaults: the dataclasses below. Every mistake a user can make raises `ValueError`
with one sentence that names file, key, value found, value expected and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.spec import rates
from src.spec.strict_yaml import (
    build,
    checked,
    key,
    known_keys,
    nearest,
    one_of,
    parse_yaml,
    read_yaml,
)

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RUN_SUFFIX = re.compile(
    r"(-rank|-sanity|-seed[0-9]+)$"
)  # what `run_name` puts behind an experiment
PHASES = ("rank", "full")
# What a ranking run measures, whatever the file says for full runs: dev perplexity decides, and
# test is scored once, at the end. On a GPU the rest would take longer than 5M tokens of training.
RANKING = {
    "metrics": ("perplexity",),
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
    allocate: str = one_of("depth", "depth", "attention")
    qk_norm: bool = key(True, "true or false")
    n_layers: int | None = key(None, "a number of layers above 0, or null", lambda v: v > 0)
    d_model: int | None = key(
        None, "a multiple of 8 above 0, or null", lambda v: v > 0 and v % 8 == 0
    )
    n_heads: int | None = key(None, "a number of heads above 0, or null", lambda v: v > 0)
    head_dim: int | None = key(None, "16, 32, 64, 128, or null", lambda v: v in (16, 32, 64, 128))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One run's optimisation. A batch counts sequences; tokens a step = batch_size * seq_len."""

    tokens: int = key(50_000_000, "a number of tokens above 0", lambda v: v > 0)
    ranking_tokens: int = key(5_000_000, "a number of tokens above 0", lambda v: v > 0)
    batch_size: int = key(256, "a number of sequences above 0", lambda v: v > 0)
    # None: batch_size. A short budget needs steps: 5M tokens are 153 steps of 256 x 128.
    ranking_batch_size: int | None = key(
        None, "a number of sequences above 0, or null", lambda v: v > 0
    )
    seq_len: int = key(128, "a number of tokens of at least 2", lambda v: v >= 2)
    learning_rate: float = key(4e-3, "a rate above 0, at most 1", lambda v: 0 < v <= 1)
    embedding_lr_ratio: float = key(1.0, "a ratio above 0, at most 100", lambda v: 0 < v <= 100)
    warmup_fraction: float = key(0.05, "a fraction from 0 to below 1", lambda v: 0 <= v < 1)
    weight_decay: float = key(0.1, "a number from 0 to 10", lambda v: 0 <= v <= 10)
    z_loss: float = key(1e-4, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    grad_clip: float = key(1.0, "a norm above 0", lambda v: v > 0)
    init_seed: int | None = key(None, "a seed from 0 to 2^31, or null", lambda v: 0 <= v < 2**31)
    data_seed: int | None = key(None, "a seed from 0 to 2^31, or null", lambda v: 0 <= v < 2**31)
    # None: a twentieth of the budget, and a hundredth of it within 8,192..131,072 tokens.
    eval_every_tokens: int | None = key(None, "tokens above 0, or null", lambda v: v > 0)
    dev_tokens: int | None = key(None, "tokens above 0, or null", lambda v: v > 0)
    checkpoint_minutes: float = key(15.0, "minutes above 0", lambda v: v > 0)
    checkpoint_every_steps: int | None = key(None, "steps above 0, or null", lambda v: v > 0)
    precision: str = one_of("auto", "auto", "fp32", "bf16", "fp16")
    micro_batch: int | None = key(None, "sequences above 0, or null", lambda v: v > 0)
    loss_chunk: int | None = key(None, "rows of logits above 0, or null", lambda v: v > 0)
    compile: str = one_of("auto", "auto", "on", "off")
    threads: int | None = key(None, "threads above 0, or null", lambda v: 0 < v <= 1024)
    deterministic: bool = key(False, "true or false")

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the budget, the last one whole."""
        return math.ceil(self.tokens / self.step_tokens)

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_fraction * self.steps)

    @property
    def eval_every_steps(self) -> int:
        """Steps between dev evaluations, at least one."""
        every = self.eval_every_tokens or self.tokens / 20
        return max(1, round(every / self.step_tokens))

    @property
    def dev_token_budget(self) -> int:
        """Dev tokens read at each evaluation during training."""
        return self.dev_tokens or min(131_072, max(8_192, self.tokens // 100))


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
class KillRule:
    """PRD section 4: stop when dev PPL is >= 0.5 worse than the baseline for 1M consecutive tokens.

    margin_ppl: perplexity points above the baseline's perplexity that count as worse.
    window_tokens: training tokens from the first to the last bad check of an unbroken streak.
    grace_tokens: checks before this many training tokens start no streak. Repeats of one 124M
        configuration differ by 0.5 PPL in the bad direction at a third of the checks in the first
        8 % of training and at under 5 % of them after 30 %, so null means 30 % of the run's
        budget; 0 is the PRD's own rule.
    action: stop ends a run at its verdict; record writes the verdict and lets the run go on, so
        that what the rule saves and costs can be counted.
    """

    action: str = one_of("stop", "stop", "record")
    margin_ppl: float = key(0.5, "a perplexity difference above 0", lambda v: v > 0)
    window_tokens: int = key(1_000_000, "tokens above 0", lambda v: v > 0)
    grace_tokens: int | None = key(None, "tokens of at least 0, or null", lambda v: v >= 0)

    def grace(self, budget: int) -> int:
        """Tokens of grace in a run of `budget` tokens."""
        return int(0.3 * budget) if self.grace_tokens is None else self.grace_tokens

    def in_run(self, budget: int) -> KillRule:
        """The rule for a run of `budget` tokens, its grace a number."""
        return dataclasses.replace(self, grace_tokens=self.grace(budget))


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
    def smallbench_tasks(self) -> Path:
        """The task list asked for, or the shipped one."""
        asked = self.evaluation.smallbench_tasks
        return SMALLBENCH_TASKS if asked is None else Path(asked)

    @property
    def token_dir(self) -> Path:
        return Path(self.data.dir) / f"v{self.model.vocab_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A validated experiment file; `runs` are its cells in file order, not yet at a seed."""

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
        """The cell `name` at `seed`; raises ValueError naming the nearest experiment."""
        for run in self.runs:
            if run.experiment == name:
                return _at_seed(run, seed)
        raise ValueError(
            f"{self.file}: experiments: found no experiment named {name!r}, expected one of "
            f"{', '.join(self.names)}{nearest(name, self.names)}"
        )

    def chosen(self, names: Sequence[str], seeds: Sequence[int] | None) -> list[RunConfig]:
        """The asked runs: seeds within experiments, the baseline first (others are judged by it).

        names: experiments, or "all"; seeds: None for the file's. ValueError for what is not there.
        """
        for seed in seeds or ():
            if not 0 <= seed < 2**31:
                raise ValueError(f"--seed: found {seed}, expected a seed from 0 to 2^31 - 1")
        asked = self.names if list(names) == ["all"] else names
        wanted = list(dict.fromkeys(run for name in asked for run in self.named(name)))
        wanted.sort(key=lambda name: name != self.baseline)
        return [self.run(name, seed) for name in wanted for seed in (seeds or self.seeds)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Phases 0 to 2 for one corpus, budget and device; read by `src.study.runner`. Paths are
    relative to the working directory, as in the sweeps."""

    embedding: str = key("configs/embed_ratio.yaml", "the sweep of embedding shares")
    glu: str = key("configs/glu_expansion.yaml", "the sweep of GLU expansions")
    vocabulary: str | None = key(None, "the vocabularies and heads of phase 1b, or null to skip")
    corpus: str | None = key(None, "the corpus that missing tokens are made from, or null")
    log_dir: str = key("logs", "a directory")
    device: str = key("auto", "auto, cpu, cuda or cuda:N")
    overrides: tuple[str, ...] = key((), "a list of section.key=value, as for --set")
    noise_seeds: int = key(5, "seeds of at least 2", lambda v: v >= 2)
    # Every share at each of these on the ranking budget; the sweep's own rate is among them.
    learning_rates: tuple[float, ...] = key(
        (), "a list of different rates above 0, at most 1",
        lambda v: all(0 < rate <= 1 for rate in v) and len(set(v)) == len(v),
    )  # fmt: skip
    # own: later stages train each share, and what is made from it, at its own best rate.
    rate: str = one_of("shared", "shared", "own")
    final_seeds: int = key(3, "seeds of at least 1", lambda v: v >= 1)
    finalists: int = key(2, "a number of configurations of at least 1", lambda v: v >= 1)
    # all: every ranking cell at the full budget too, one seed, for the rank agreement.
    full: str = one_of("finalists", "finalists", "all")
    vocabulary_seeds: int = key(1, "seeds of at least 1", lambda v: v >= 1)
    # auto: one run on all cores against one a core, measured; a run a GPU.
    jobs: int | str = key(
        1,
        "auto, or runs at a time, from 1 to 64",
        lambda v: v == "auto" or isinstance(v, int) and 1 <= v <= 64,
    )
    budget_usd: float = key(50.0, "dollars above 0", lambda v: v > 0)
    runbook_budget_usd: float = key(150.0, "dollars above 0", lambda v: v > 0)
    # None: from earlier runs of log_dir, else from a short probe on the device.
    tokens_per_s: float | None = key(None, "tokens a second above 0, or null", lambda v: v > 0)


def load_study(path: Path) -> StudyConfig:
    """Read a study file; raises ValueError (one sentence) for what a user can get wrong."""
    return build(StudyConfig, f"{path}: ", read_yaml(path, "a study file"))


def run_name(experiment: str, phase: str, seed: int) -> str:
    """`<exp>[-rank][-seed<k>]`: the full budget and seed 0 carry no suffix."""
    return experiment + ("-rank" if phase == "rank" else "") + (f"-seed{seed}" if seed else "")


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
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


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
    """`load_sweep` of values that were read (or made) already; `path` names them in errors."""
    where = f"{path}: "
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}found {raw!r}, expected a mapping with the key experiments")
    known_keys(where, raw, _TOP_KEYS)
    forced = _parse_overrides(overrides)
    entries = _experiment_entries(where, raw.get("experiments"))
    baseline = raw.get("baseline", entries[0]["name"])
    cells = rates.expand(where, raw, entries, forced, _rate)
    names = [entry["name"] for entry in (*entries, *(cells.entries if cells.runs else ()))]
    if baseline not in names:
        raise ValueError(
            f"{where}baseline: found {baseline!r}, expected one of the experiments "
            f"{', '.join(names)}{nearest(str(baseline), names)}"
        )
    seeds = _seeds(where, raw.get("seeds", [0]))
    states_kill_rule = raw.get("kill_rule") is not None or "kill_rule" in forced
    baseline = cells.runs.get(baseline, (baseline,))[0]  # at the first rate of its list
    runs = tuple(
        _run(where, cells.shared, entry, cells.forced, baseline, phase)
        for entry in _experiment_entries(where, cells.entries)
    )
    if cells.runs:
        runs = _without_kill_rule(where, runs, states_kill_rule)
    return Sweep(
        file=path,
        baseline=baseline,
        seeds=seeds,
        phase=phase,
        states_kill_rule=states_kill_rule,
        runs=runs,
        rates=cells.runs,
    )


def _rate(place: str, value: Any) -> float:
    (spec,) = (s for s in dataclasses.fields(TrainingConfig) if s.name == "learning_rate")
    return float(checked(place, spec, value))


def _without_kill_rule(
    where: str, runs: tuple[RunConfig, ...], states_kill_rule: bool
) -> tuple[RunConfig, ...]:
    """A rate far off is a point that the fit over rates needs: nothing stops it, in any phase."""
    if not states_kill_rule:
        return tuple(dataclasses.replace(run, kill_rule=None) for run in runs)
    if all(run.kill_rule is not None and run.kill_rule.action == "record" for run in runs):
        return runs
    raise ValueError(
        f"{where}kill_rule: found a kill rule beside a list of learning rates, expected none or "
        "action: record: the fit needs the runs at bad rates too; or state one "
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
        if dotted == "training.learning_rate" and isinstance(parsed, list):
            forced.setdefault(section, {})[name] = parsed  # checked with the file's own lists
            continue
        build(_SECTIONS[section], f"--set {section}.", {name: parsed})
        forced.setdefault(section, {})[name] = parsed
    return forced


def _experiment_entries(where: str, entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}experiments: found {entries!r}, expected a list with a name each")
    folded: dict[str, str] = {}
    for index, entry in enumerate(entries):
        here = f"{where}experiments[{index}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{here}: found {entry!r}, expected a mapping with the key name")
        name = entry.get("name")
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            raise ValueError(
                f"{here}.name: found {name!r}, expected 1 to 64 letters, digits, '.', '_' or "
                "'-', the first a letter or digit"
            )
        if name == "all":
            raise ValueError(f"{here}.name: found 'all', which --exp keeps for every experiment")
        if _is_retyped(name):
            raise ValueError(
                f"{here}.name: found {name!r}, expected a name that readers of tables (pandas' "
                "read_csv, say) do not take for a number or a missing value"
            )
        if RUN_SUFFIX.search(name):
            raise ValueError(
                f"{here}.name: found {name!r}, expected a name that does not end like the "
                "directory of another experiment's ranking run or seed (-rank, -seed1)"
            )
        if name.casefold() in folded:
            raise ValueError(
                f"{here}.name: found {name!r}, which clashes with {folded[name.casefold()]!r}; "
                "expected names that differ by more than case"
            )
        folded[name.casefold()] = name
    return [dict(entry) for entry in entries]


def _is_retyped(name: str) -> bool:
    """Whether a reader of tables turns the name into something else: 007, 1e5, NA, true."""
    if name.casefold() in ("na", "null", "none", "true", "false"):
        return True
    try:
        float(name)  # nan, inf and 1_000 too
    except ValueError:
        return False
    return True


def _seeds(where: str, seeds: Any) -> tuple[int, ...]:
    good = isinstance(seeds, list) and seeds and len(set(map(str, seeds))) == len(seeds)
    if not good or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        raise ValueError(f"{where}seeds: found {seeds!r}, expected a list of different seeds")
    return tuple(seeds)


def _run(
    where: str,
    raw: Mapping[str, Any],
    entry: Mapping[str, Any],
    forced: Mapping[str, dict[str, Any]],
    baseline: str,
    phase: str,
) -> RunConfig:
    """One cell: file defaults, then the experiment's own keys, then --set."""
    name = entry["name"]
    here = f"{where}experiments.{name}."
    model_keys = [spec.name for spec in dataclasses.fields(ModelRequest)]
    if "model" in entry:
        raise ValueError(
            f"{here}model: found a section, expected the model's keys beside name, such as "
            "vocab_size: 4096"
        )
    known_keys(here, entry, ["name", *model_keys, "training"])
    own: dict[str, Any] = {"model": {k: v for k, v in entry.items() if k in model_keys}}
    own["training"] = entry.get("training")
    built: dict[str, Any] = {}
    for section, kind in _SECTIONS.items():
        layers = (
            (f"{where}{section}.", raw.get(section)),
            (here if section == "model" else f"{here}{section}.", own.get(section)),
            (f"--set {section}.", forced.get(section)),
        )
        stated = [(place, layer) for place, layer in layers if layer is not None]
        for place, layer in stated:  # each layer by itself, so that an error names its place
            build(kind, place, layer)
        values = {name: value for _, layer in stated for name, value in layer.items()}
        if section == "kill_rule" and not stated and phase != "rank":
            built[section] = None
            continue
        # PRD 6.2 leaves the share out: the default, unless a table or a width decides it.
        if section == "model" and not any(
            values.get(key) for key in ("embedding_ratio", "embedding_dim", "d_model")
        ):
            values["embedding_ratio"] = DEFAULT_SHARE
        built[section] = build(kind, f"{where}{section}.", values)
    training: TrainingConfig = built["training"]
    if phase == "rank":
        training = dataclasses.replace(
            training,
            tokens=min(training.tokens, training.ranking_tokens),
            batch_size=training.ranking_batch_size or training.batch_size,
        )
        built["evaluation"] = dataclasses.replace(
            built["evaluation"],
            **{k: v for k, v in RANKING.items() if k not in forced.get("evaluation", {})},
        )
    built["training"] = training
    _check_training(where, training)
    return RunConfig(experiment=name, baseline=baseline, seed=0, phase=phase, **built)


def _check_training(where: str, training: TrainingConfig) -> None:
    if training.tokens < training.step_tokens:
        raise ValueError(
            f"{where}training.tokens: found {training.tokens:,}, expected at least one step of "
            f"batch_size x seq_len = {training.step_tokens:,} tokens; lower training.batch_size"
        )
    if training.steps > 1 and training.warmup_steps >= training.steps:
        raise ValueError(
            f"{where}training.warmup_fraction: found {training.warmup_fraction}, which warms up "
            f"for {training.warmup_steps} of {training.steps} steps; expected fewer"
        )
    if training.micro_batch is not None and training.batch_size % training.micro_batch:
        raise ValueError(
            f"{where}training.micro_batch: found {training.micro_batch}, expected a divisor of "
            f"batch_size {training.batch_size}"
        )


def _at_seed(run: RunConfig, seed: int) -> RunConfig:
    """The run at `seed`; seeds of initialisation and data order follow where not stated."""
    training = run.training
    training = dataclasses.replace(
        training,
        init_seed=seed if training.init_seed is None else training.init_seed,
        data_seed=seed if training.data_seed is None else training.data_seed,
    )
    return dataclasses.replace(run, seed=seed, training=training)
