"""A finished run read back for evaluation: its resolved config, native weights and tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer

from src.data import leakage
from src.data.tokenizer import load_tokenizer
from src.evaluation.metrics import edited
from src.models.export import export
from src.models.transformer import Transformer
from src.spec.config import EvaluationConfig, ModelConfig, to_dict
from src.storage import checkpoint
from src.storage.files import read_json, sha256_of
from src.storage.run_dir import exported

_REQUIRED_KEYS = {"config_digest", "model", "training", "tokenizer_sha256", "data_sha256"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRun:
    """`resolved` is the content of config.yaml; `model` is on the device asked for."""

    path: Path
    resolved: dict[str, Any]
    model: Transformer
    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """Tokens the model was trained to read."""
        return int(self.resolved["training"]["seq_len"])

    @property
    def evaluation(self) -> dict[str, Any]:
        """The section as the run (of a tuned one, its base) was evaluated; else the defaults."""
        return self.resolved.get("evaluation") or to_dict(EvaluationConfig())

    def contaminated_rows(self, smallbench_dir: Path) -> dict[str, set[int]] | None:
        """Rows that this run's training text contains; None where no report says so."""
        if "data_dir" not in self.resolved:
            return None
        token_dir = Path(self.resolved["data_dir"]) / f"v{self.model.config.vocab_size}"
        meta = token_dir / "meta.json"
        corpus = json.loads(meta.read_bytes())["corpus"] if meta.is_file() else {}
        report = self.evaluation.get("leakage")
        return leakage.contaminated_rows(report, smallbench_dir, corpus)


def _read_config(path: Path) -> dict[str, Any]:
    """The content of its config.yaml; ValueError where that is none."""
    try:
        resolved = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename}: found no such file, expected the directory of a finished run"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / 'config.yaml'} cannot be read: {error}") from None
    if not isinstance(resolved, dict) or not _REQUIRED_KEYS <= resolved.keys() or edited(resolved):
        raise ValueError(
            f"{path / 'config.yaml'}: found another content than a run has written, expected that; "
            "restore it from a copy"
        )
    return resolved


def _untrained(resolved: dict[str, Any]) -> Transformer:
    with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
        return Transformer(ModelConfig(**resolved["model"]))


def load_shape(path: Path) -> tuple[Transformer, bool]:
    """The model of `logs/<run>` for its speed alone, and whether it has the trained weights.

    A finished run whose weights are gone, as after a move to another machine with what was
    published, has the same shape untrained: the same operations take the same time.
    """
    metrics = path / "metrics.json"
    if exported(path) or not metrics.is_file() or read_json(metrics).get("status") == "killed":
        return load_run(path).model, True
    return _untrained(_read_config(path)).eval(), False


def load_run(path: Path, device: torch.device | str = "cpu") -> TrainedRun:
    """Read `logs/<run>`; raises ValueError where it is no finished run or its files disagree."""
    resolved, metrics_path = _read_config(path), path / "metrics.json"
    metrics = read_json(metrics_path) if metrics_path.is_file() else {}
    if metrics.get("status") == "killed":
        raise ValueError(f"{path}: the kill rule stopped this run, so it has no final model")
    if not exported(path):
        raise ValueError(
            f"{path}/final: found no whole export; run the experiment's command (again): it goes "
            "on to the end, or writes the export of a finished run from its last checkpoint"
        )
    tokenizer = path / "final" / "tokenizer.json"
    sha256 = sha256_of(tokenizer)
    if sha256 != resolved["tokenizer_sha256"]:
        raise ValueError(
            f"{tokenizer}: found the hash {sha256[:12]}, expected "
            f"{resolved['tokenizer_sha256'][:12]} as in config.yaml; export the run again"
        )
    digests = {
        "config": resolved["config_digest"],
        "tokenizer": resolved["tokenizer_sha256"],
        "data": resolved["data_sha256"],
    }
    weights = _final_weights(path, digests, metrics.get("steps"))
    model = _untrained(resolved)
    model.load_state_dict(weights)
    return TrainedRun(
        path=path,
        resolved=resolved,
        model=model.to(device).eval(),
        tokenizer=load_tokenizer(tokenizer),
    )


def export_again(
    path: Path,
    model: Transformer,
    tokenizer_json: Path,
    *,
    digests: dict[str, str],
    steps: int,
    context: int,
    chat_template: str | None = None,
) -> None:
    """Write `final/` of a finished run that has lost it, from the checkpoint of its last step; does
    nothing where it is there. `model` has the run's shape, its weights are replaced."""
    if exported(path):
        return
    model.load_state_dict(_final_weights(path, digests, steps))
    export(
        model, tokenizer_json, path / "final",
        max_position_embeddings=context, chat_template=chat_template,
    )  # fmt: skip
    print(f"{path.name}: final/ was missing and is written again", flush=True)


def _final_weights(path: Path, digests: dict[str, str], steps: int | None) -> dict[str, Any]:
    """Of the newest checkpoint, which has to be the last step's where that is known."""
    loaded = checkpoint.load_latest(path / "checkpoints", digests=digests)
    if loaded is None or loaded[1]["step"] != (steps or loaded[1]["step"]):
        step = "none" if loaded is None else f"step {loaded[1]['step']}"
        raise ValueError(
            f"{path}/checkpoints: found {step} as the newest that can be trusted, expected that of "
            f"the last step{'' if steps is None else f', {steps}'}; restore it from a copy, or "
            "delete the directory to train again"
        )
    return loaded[0]["model"]
