"""Every key of metrics.json and every column of the CSVs: name, type, unit, meaning. One list.

    python scripts/document_keys.py      writes the tables of docs/METRICS.md from it

metrics.json has exactly these keys (those that are `csv_only` aside), null where nothing was
measured; the CSVs have exactly these columns. To add a key, add a line here, let the run write it,
and run that command.
"""
# ruff: noqa: E501 (a table: one key a line)

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "integer", "number", "true/false"]


@dataclass(frozen=True, slots=True)
class Request:
    """One quantity that the YAML asks for under `request` and the allocator then builds."""

    request: str

    @property
    def asked(self) -> str:
        return f"{self.request}_asked"

    @property
    def built(self) -> str:
        return f"{self.request}_built"


TOTAL_PARAMS = Request("total_params")
EMBEDDING_RATIO = Request("embedding_ratio")
GLU_EXPANSION = Request("glu_expansion")
REQUESTS = (TOTAL_PARAMS, EMBEDDING_RATIO, GLU_EXPANSION)
SMALLBENCH = "smallbench"  # an object by task in metrics.json, columns of their own in the CSV


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `summary`: it stands in results_summary.csv, the others in results_details.csv."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    summary: bool = False
    csv_only: bool = False


def _text(name: str, meaning: str, **more: bool) -> Key:
    return Key(name, "text", "text", meaning, **more)


def _hash(name: str, meaning: str, **more: bool) -> Key:
    return Key(name, "text", "hex", meaning, **more)


def _flag(name: str, meaning: str, **more: bool) -> Key:
    return Key(name, "true/false", "true/false", meaning, **more)


def _count(name: str, unit: str, meaning: str, **more: bool) -> Key:
    return Key(name, "integer", unit, meaning, **more)


def _number(name: str, unit: str, meaning: str, **more: bool) -> Key:
    return Key(name, "number", unit, meaning, **more)


def _losses(split: str, first: str) -> list[Key]:
    """What a whole split of the run's own corpus is measured in."""
    also = "" if split == "dev" else "; see the key of dev"
    return [
        _number(f"{split}_loss", "nats/token", first),
        _number(f"{split}_perplexity", "", f"exp of the loss; comparable only under one tokenizer{also}", summary=True),
        _number(f"{split}_bits_per_byte", "bits/byte", f"loss over UTF-8 bytes; comparable across vocabularies{also}", summary=True),
        _number(f"{split}_word_perplexity", "", f"per whitespace word; comparable across vocabularies{also}"),
        _number(f"{split}_perplexity_nonoverlapping", "", f"token perplexity from separate windows{also}"),
        _count(f"{split}_tokens_scored", "tokens", f"of the {split} split that these numbers are over: all of its text tokens, or the first documents of `evaluation.perplexity_tokens`"),
    ]  # fmt: skip


def _outside(split: str) -> list[Key]:
    return [
        _number(f"outside_{split}_bits_per_byte", "bits/byte", f"its {split} split, encoded with the run's tokenizer", summary=split == "test"),
        _number(f"outside_{split}_word_perplexity", "", f"see `{split}_word_perplexity`"),
        _count(f"outside_{split}_tokens_scored", "tokens", f"see `{split}_tokens_scored`"),
    ]  # fmt: skip


_STATISTICS = {"p50": "median", "p95": "95th percentile"}


def _latency(kind: str, what: str) -> list[Key]:
    """One pass over L = 128 and 512 tokens."""
    return [
        _number(f"latency_{kind}ms_{name}_l{length}", "ms", f"{statistic} of one pass over L = {length} to the last token's logits{what}", summary=not kind and name == "p50")
        for length in (128, 512)
        for name, statistic in _STATISTICS.items()
    ]  # fmt: skip


def _decode(kind: str, what: str) -> list[Key]:
    return [
        _number(f"decode_{kind}ms_per_token_{name}", "ms/token", f"{statistic} of a {what}")
        for name, statistic in _STATISTICS.items()
    ]


def _ratios(length: int) -> list[Key]:
    """What one process measured in turns: only that compares two runs."""
    return [
        _number(f"latency_ratio_l{length}", "factor", f"median at L = {length} over that of `latency_ratio_to`; 1 for that run itself", csv_only=True),
        _number(f"latency_ratio_low_l{length}", "factor", "lower end of its 95 % interval", csv_only=True),
        _number(f"latency_ratio_high_l{length}", "factor", "upper end", csv_only=True),
    ]  # fmt: skip


SECTIONS: dict[str, tuple[Key, ...]] = {
    "who": (
        _text("run", "the run directory's name below the log directory; the key of both CSVs", summary=True),
        _text("path", "where it was found; CSV only", csv_only=True),
        _text("status", "`finished`; `killed` by the kill rule; `failed` with a reason; `unfinished`, no `metrics.json` yet; `missing`, named by its sweep and provided by no run. The last three only in the CSV", summary=True),
        _text("reason", "why a run is not `finished`; of a finished one, the run whose numbers stand here, or where a copy was found", summary=True),
        _text("same_as", "the run whose numbers stand here, where an equal one was trained; CSV only", csv_only=True),
        _text("experiment", "name in the sweep's YAML", summary=True),
        _text("sweep", "the sweep's YAML file", summary=True),
        _flag("baseline", "this run is of the sweep's baseline experiment", summary=True),
        _text("baseline_name", "the sweep's baseline experiment"),
        _text("phase", "`rank` (short, its own schedule), `full`, or `tuning`: instruction tuning of a finished run, whose model and cost stand here and whose answer losses stand in its `tuning.json`; no corpus loss is filled in", summary=True),
        _count("seed", "", "the run's seed", summary=True),
        _count("init_seed", "", "seed of the initialisation"),
        _count("data_seed", "", "seed of the data order"),
    ),
    "model": (
        _count(TOTAL_PARAMS.asked, "parameters", "the budget: `model.total_params` in the YAML"),
        _count(TOTAL_PARAMS.built, "parameters", "all parameters of the model, each tensor once", summary=True),
        _number(EMBEDDING_RATIO.asked, "share, 0 to 1", "share of parameters asked for the embeddings: `model.embedding_ratio` in the YAML", summary=True),
        _number(EMBEDDING_RATIO.built, "share, 0 to 1", "the share that was built: (`params_embedding` + `params_projection`) / `total_params_built`", summary=True),
        _number(GLU_EXPANSION.asked, "factor", "FFN width asked, in d_model: `model.glu_expansion` in the YAML", summary=True),
        _number(GLU_EXPANSION.built, "factor", "`d_ff` / `d_model` as built", summary=True),
        _count("vocab_size", "tokens", "entries of the vocabulary", summary=True),
        _count("d_model", "channels", "width of the residual stream", summary=True),
        _count("n_layers", "layers", "depth", summary=True),
        _count("n_heads", "heads", "attention heads", summary=True),
        _count("head_dim", "channels", "width of a head", summary=True),
        _count("d_ff", "channels", "inner width of the SwiGLU", summary=True),
        _count("embedding_dim", "channels", "E of a factorised table V x E, E x d_model; empty for a plain table", summary=True),
        _flag("tie_embeddings", "input and output share one table", summary=True),
        _flag("qk_norm", "queries and keys are normalised"),
        _number("attention_width_ratio", "factor", "`n_heads` x `head_dim` / `d_model`"),
        _count("params_embedding", "parameters", "tables of input and output"),
        _count("params_projection", "parameters", "E x d_model projections of a factorised table"),
        _count("params_attention", "parameters", "all layers' attention"),
        _count("params_ffn", "parameters", "all layers' SwiGLU"),
        _count("params_norm", "parameters", "all norms"),
        _count("flops_per_token", "FLOPs", "of training: forward and backward, per token at `seq_len`, head and causal attention included"),
    ),
    "training": (
        _count("tokens", "tokens", "trained on; for a killed or unfinished run, until it stopped", summary=True),
        _count("steps", "steps", "optimizer steps taken", summary=True),
        _number("epochs", "passes", "`tokens` / tokens of the train split"),
        _count("batch_size", "sequences", "of one optimizer step", summary=True),
        _count("seq_len", "tokens", "of a sequence", summary=True),
        _number("learning_rate", "", "peak, of everything but the embeddings", summary=True),
        _number("embedding_lr_ratio", "factor", "the embeddings' peak rate over `learning_rate`"),
        _text("kill_verdict", "the kill rule at the run's end: `kill`, `keep`, or `none` (no baseline curve); empty where the rule is not on", summary=True),
        _text("kill_verdict_literal", "the same without `grace_tokens`: the PRD's literal rule"),
        _text("kill_action", "`stop`, or `record`: the verdict is written and the run goes on"),
        _count("kill_tokens", "tokens", "at the check that first said kill; with `record` the run went on"),
        _count("kill_checks_without_baseline", "checks", "made before the baseline's own check at these tokens was there: in `metrics.jsonl` the rows of kind `kill_rule` say which"),
        _number("train_loss", "nats/token", "smoothed over the last steps"),
        _number("loss_largest_rise_nats", "nats/token", "largest rise of the training loss from one step to the next, over every step of the run; below zero where it only fell; empty for a run of one step. Figures mark more than 1 nat as a jump"),
        _count("loss_largest_rise_step", "step", "the step that this rise led to"),
        _number("grad_norm_largest_rise", "norm", "the same of the gradient norm, before clipping"),
        _count("grad_norm_largest_rise_step", "step", "the step that this rise led to"),
    ),
    "quality": (
        *_losses("dev", "dev split; of a killed run, its last evaluation during training (`dev_tokens`, separate windows)"),
        *_losses("test", "test split"),
        _text("outside_corpus", "the corpus of `evaluation.outside_dir`, as its `source.json` names it; this and the next six are `null` without one"),
        *_outside("dev"),
        *_outside("test"),
        _number("smallbench_accuracy", "share, 0 to 1", "mean over tasks", summary=True),
        _number("smallbench_accuracy_se", "share", "its standard error", summary=True),
        _number("smallbench_chance", "share", "what guessing gets: the mean over the same tasks", summary=True),
        _number("smallbench_untrained_accuracy", "share", "the same model untrained (seed 0) on the same items; `null` where `evaluation.smallbench_untrained` is false", summary=True),
        _count("smallbench_items", "items", "scored, over all tasks"),
        _count("smallbench_tasks", "tasks", "in that mean; a group of tasks counts as one"),
        _text("smallbench_missing_tasks", "names of listed tasks without rows here, joined by a space; `null` where all have them"),
        _text("smallbench_contaminated_tasks", "names of tasks of which the train split holds every item: n 0, in no mean; `null` where there are none"),
        _count("smallbench_limit", "items", "most a task; `null`: the task list's own `n`"),
        _count("smallbench_contaminated_items", "items", "dropped because the train split holds them; `null` without a leakage report"),
        _number("blimp_accuracy", "share", "mean over all BLiMP paradigms, every row of each (67,000); the next two likewise, `null` without `evaluation.blimp_full`"),
        _number("blimp_accuracy_se", "share", "its standard error"),
        _count("blimp_items", "items", "scored"),
    ),
    "speed": (
        *_latency("", ""),
        *_latency("compiled_", ", compiled blocks in CUDA graphs"),
        _text("latency_ratio_to", "the run that was measured in turns with this one, in one process (`latency/`)", csv_only=True),
        *_ratios(128),
        *_ratios(512),
        *_decode("", "decoding step"),
        *_decode("compiled_", "compiled decoding step in a CUDA graph"),
        _number("weights_mib", "MiB", "parameters as held: float32"),
        _number("kv_cache_mib", "MiB", "keys and values of the longest L measured"),
        _number("activations_mib", "MiB", "peak of a prefill of the longest L, to the last token's logits"),
        _number("peak_memory_mib", "MiB", "weights + cache + activations; the winner rule's memory", summary=True),
        _number("process_peak_memory_mib", "MiB", "most the process has held, training included"),
    ),
    "cost": (
        _number("train_seconds", "s", "in the training loop, over all its processes if it was resumed"),
        _number("eval_seconds", "s", "in the evaluations"),
        _number("wall_seconds", "s", "of the last process from its start, and of earlier ones up to the checkpoint that was resumed; what a killed process did after its last checkpoint (at most `checkpoint_minutes`) and its start-up are paid for, but not seen", summary=True),
        _number("tokens_per_s", "tokens/s", "of training, median", summary=True),
        _number("gpu_utilisation_percent", "%", "mean while training"),
        _number("train_peak_memory_mib", "MiB", "peak while training"),
        _number("gpu_hours", "h", "`wall_seconds` on a GPU, once for each GPU where several processes share a run"),
        _number("cost_usd", "USD", "`wall_seconds` at the price in `configs/prices.yaml`", summary=True),
    ),
    "reproduction": (
        _text("corpus", "dataset and configuration the tokens come from", summary=True),
        _hash("tokenizer_sha256", "hash of `tokenizer.json`"),
        _hash("data_sha256", "hash of the token files"),
        _hash("config_digest", "hash of the resolved configuration without its evaluation: what checkpoints must agree with; of runs of builds that had no `evaluation_digest`, with it"),
        _hash("evaluation_digest", "hash of the section `evaluation`; it may change after training: the run is then evaluated again from its last checkpoint"),
        _hash("model_digest", "hash of the model's integers: equal configurations are the same model"),
        _hash("training_digest", "hash of what decides what is learned: the training section without seeds, checks and how it is computed; with `model_digest`, the data and the seeds it says that two runs are one, whatever they are called"),
        _hash("compute_digest", "hash of what changes bits besides the configuration: bytes of the source files that `src.train` imports, torch, numpy, device and instruction set, precision, micro-batch, chunk, compilation, threads, processes (`environment.json` lists them); of a run that was resumed under another, both, joined by `+`", summary=True),
        _hash("program_digest", "the same without the processor's name and instruction set: runs that share it are compared, and where only `compute_digest` differs, that is said"),
        _text("processors", "each device name and instruction set that computed the run, joined by `;`"),
        _hash("git_sha", "commit of the code"),
        _flag("git_dirty", "the checkout had uncommitted changes"),
        _text("device", "`cuda` or `cpu`"),
        _text("device_name", "the device's own name", summary=True),
        _text("precision", "`bf16`, `fp16` or `fp32`", summary=True),
        _count("micro_batch", "sequences", "computed at a time; a batch is accumulated from them"),
        _count("loss_chunk", "rows", "of logits at a time, so that a batch of them never exists"),
        _flag("compile", "blocks compiled"),
        _count("threads", "threads", "CPU threads"),
        _count("schema", "", "version of this list"),
    ),
}  # fmt: skip
"""The keys by section of docs/METRICS.md, in the order of the CSVs' columns."""

KEYS = {key.name: key for keys in SECTIONS.values() for key in keys}
SUMMARY = tuple(name for name, key in KEYS.items() if key.summary)
DETAILS = ("run", *(name for name in KEYS if name not in SUMMARY))
TEXT = frozenset(name for name, key in KEYS.items() if key.kind == "text")
STORED = frozenset({*(name for name, key in KEYS.items() if not key.csv_only), SMALLBENCH})
"""The keys of metrics.json."""


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json's content: `values` in the order of the list, null where it has none."""
    listed = {name: values.get(name) for name in KEYS if name in STORED}
    return listed | {SMALLBENCH: values.get(SMALLBENCH)} | dict(values)


def table(keys: Iterable[Key]) -> str:
    """The keys as a Markdown table."""
    rows = [f"| `{key.name}` | {key.unit} | {key.meaning} |" for key in keys]
    return "\n".join(["| key | unit | meaning |", "|---|---|---|", *rows])


def reading() -> str:
    """How results_summary.csv is read without a name such as 1e5 becoming a number, and what it
    holds."""
    columns = ", ".join(f"`{name}`" for name in SUMMARY)
    texts = " ".join(name for name in KEYS if name in TEXT)
    return f"""\
`results_summary.csv` has {len(SUMMARY)} columns: {columns}. Everything else is in `results_details.csv`, which is joined by `run`:

```python
texts = "{texts}"
how = {{"dtype": dict.fromkeys(texts.split(), str), "keep_default_na": False, "na_values": [""]}}
runs = pandas.read_csv("results_summary.csv", **how)
every = runs.merge(pandas.read_csv("results_details.csv", **how), on="run")
```"""
