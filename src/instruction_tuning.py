"""Light instruction tuning of a finished run: loss on the answers only, same run directory rules.

    python -m src.instruction_tuning --run logs/emb35 --data data/instructions

Makes <log_dir>/<run>-tuned: config.yaml, metrics.jsonl, checkpoints/, final/, tuning.json (held-out
answer loss before and after, sample generations) and, last, metrics.json with its cost.
Exit codes as in run_experiment.py. Shapes: B examples, T tokens, N answer tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.compute import compute_config, runtime
from src.compute.compute_config import ComputeConfig
from src.data.chat_template import chat_template
from src.data.instructions import END, Batches, Example, collate, encode, read_rows
from src.evaluation.metrics import computed
from src.evaluation.trained_run import TrainedRun, export_again, load_run
from src.models.export import NotLoadable, export
from src.models.transformer import Transformer
from src.spec import config
from src.spec.command_line import OK, OUR_FAULT, TRY_AGAIN, Parser, at_least, refuse
from src.spec.config import TrainingConfig
from src.spec.metric_keys import REQUESTS, complete
from src.spec.progress import Progress
from src.storage import checkpoint
from src.storage.files import read_json, write_json
from src.storage.run_dir import Held, Preemption, RunDir
from src.train import final_loss
from src.training_step import NonFinite, Stepper, learning_rate, next_token_loss

SAMPLES = 4
SAMPLE_TOKENS = 48
# What decides a tuning run beside the run it starts from.
SETTINGS = ("epochs", "batch_size", "learning_rate", "seed")

# ----------------------------------------------------------------------------------------- losses


def answer_nats(
    model: Transformer, examples: Sequence[Example], compute: ComputeConfig
) -> tuple[Tensor, int]:
    """Mean nats of the answers' tokens (differentiable) and their number."""
    tokens, answers = (part.to(compute.device) for part in collate(examples))
    # Prompts never reach the head.
    loss, _ = next_token_loss(model, tokens, compute, 0.0, scored=answers)
    return loss, int(answers.sum())


@torch.no_grad()
def held_out_loss(
    model: Transformer, examples: Sequence[Example], compute: ComputeConfig, batch_size: int = 16
) -> float:
    """Nats per answer token over all examples, every token weighing the same."""
    total = count = 0.0
    for start in range(0, len(examples), batch_size):
        nats, tokens = answer_nats(model, examples[start : start + batch_size], compute)
        total, count = total + float(nats) * tokens, count + tokens
    return total / count


@torch.no_grad()
def generate(model: Transformer, prompt: Sequence[int], context: int, limit: int) -> list[int]:
    """Greedy continuation of at most `limit` tokens (fewer than the context), up to the end token;
    a long prompt loses its beginning, so that there is room."""
    device = model.norm.weight.device
    ids = list(prompt)[-(context - limit) :]
    cache = model.new_cache(1, context)
    logits = model(torch.tensor([ids], device=device), cache)[:, -1]
    generated: list[int] = []
    for _ in range(limit):
        token = int(logits.argmax())
        if token == END:
            break
        generated.append(token)
        logits = model(torch.tensor([[token]], device=device), cache)[:, -1]
    return generated


def samples(base: TrainedRun, rows: Sequence[dict[str, str]]) -> list[str]:
    """Answers to the first prompts."""
    base.model.eval()
    texts = []
    for row in rows[:SAMPLES]:
        prompt = [END, *base.tokenizer.encode(row["prompt"], add_special_tokens=False).ids]
        ids = generate(base.model, prompt, base.context, min(SAMPLE_TOKENS, base.context // 2))
        texts.append(base.tokenizer.decode(ids))
    return texts


# ----------------------------------------------------------------------------------------- tuning


def tune(args: argparse.Namespace) -> int:
    """Tune the run that the command line asks for, or go on with it; returns an exit code."""
    start = time.perf_counter()
    rows = {name: read_rows(args.data / f"{name}.jsonl") for name in ("train", "validation")}
    base = load_run(args.run)
    examples = {
        name: [encode(base.tokenizer, r["prompt"], r["answer"], base.context) for r in part]
        for name, part in rows.items()
    }
    template = chat_template(row["prompt"] for row in rows["train"])
    batches = Batches(examples["train"], args.batch_size, args.seed)
    training = _training(base, args, batches)
    resolved = _resolved(base, args, training)
    digest = config.digest(resolved)
    digests = {"config": digest, "tokenizer": base.resolved["tokenizer_sha256"],
               "data": resolved["data_sha256"]}  # fmt: skip
    tokenizer_path = base.path / "final" / "tokenizer.json"
    log_dir = args.log_dir or args.run.parent
    with RunDir.open(log_dir, resolved["experiment"]) as directory:
        directory.claim_config(resolved, digest)
        if directory.finished() is not None:
            export_again(
                directory.path, base.model, tokenizer_path,
                digests=digests, steps=training.steps, context=base.context,
                chat_template=template,
            )  # fmt: skip
            print(f"{directory.path}: finished before, nothing to do")
            return OK
        directory.clear_failure()
        compute = compute_config.choose(training, base.model.config, log_dir, args.device)
        base.model.to(compute.device)
        before = samples(base, rows["validation"])
        try:
            tuner = Tuner(base.model, training, batches, directory, compute, digests)
            if not tuner.run(examples["validation"]):
                print(f"{directory.path}: stopped at step {tuner.step}; run me again")
                return TRY_AGAIN
            losses = [row["answer_loss"] for row in directory.rows("dev")]
            result = _tuning_json(base, rows["validation"], losses, before)
            write_json(directory.path / "tuning.json", result)
            export(base.model, tokenizer_path, directory.path / "final",
                   max_position_embeddings=base.context, chat_template=template)  # fmt: skip
        except (NonFinite, NotLoadable) as error:
            directory.record_failure(type(error).__name__, str(error))
            print(error, file=sys.stderr)
            return OUR_FAULT
        wall = max(time.perf_counter() - start, tuner.seconds)
        directory.finish(_metrics(base, resolved, digest, tuner, wall))
    return OK


def _training(base: TrainedRun, args: argparse.Namespace, batches: Batches) -> TrainingConfig:
    """The base run's recipe at the tuning's rate and length; a step counts context x batch."""
    recipe = TrainingConfig(**base.resolved["training"])
    steps = args.epochs * batches.per_epoch
    return replace(
        recipe,
        batch_size=batches.size,
        tokens=steps * batches.size * recipe.seq_len,
        learning_rate=args.learning_rate,
        micro_batch=None,
        compile="off",  # ragged batches would be compiled again and again
    )


def _resolved(
    base: TrainedRun, args: argparse.Namespace, training: TrainingConfig
) -> dict[str, Any]:
    """config.yaml's content; the digest covers all of it."""
    files = [args.data / f"{name}.jsonl" for name in ("train", "validation")]
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files))
    name = f"{base.path.name}-tuned"
    return {
        "experiment": name,
        "baseline": name,
        "phase": "tuning",
        "seed": args.seed,
        "base": {"run": base.path.name, "config_digest": base.resolved["config_digest"]},
        "model": base.resolved["model"],
        "training": config.to_dict(training),
        "tuning": {name: getattr(args, name) for name in SETTINGS},
        "tokenizer_sha256": base.resolved["tokenizer_sha256"],
        "data_sha256": digest.hexdigest(),
        # Both are scored on the same items.
        **{key: base.resolved[key] for key in ("evaluation", "data_dir") if key in base.resolved},
    }


class Tuner(Stepper):
    """The tuning's step, its held-out loss, and everything that its checkpoints hold."""

    def __init__(
        self, model: Transformer, training: TrainingConfig, batches: Batches, directory: RunDir,
        compute: ComputeConfig, digests: dict[str, str],
    ) -> None:  # fmt: skip
        super().__init__(model, training, compute)
        self.batches, self.directory, self.digests = batches, directory, digests
        loaded = checkpoint.load_latest(
            directory.checkpoints, digests=digests, misfit=directory.misfit
        )
        if loaded is not None:
            self.load_state(loaded[0])
        directory.truncate(0 if loaded is None else loaded[0]["metrics_offset"])

    def run(self, held_out: Sequence[Example]) -> bool:
        """Train to the end (True) or to a signal (False): evaluate, save, stop?, step, log."""
        steps, saved_at = self.training.steps, time.perf_counter()
        name = self.directory.path.name
        with Preemption() as stop, Progress(name, steps, "steps", done=self.step) as progress:
            while True:
                last = self.step == steps
                if self.step % self.batches.per_epoch == 0 or last:
                    self._evaluate(held_out)
                due = time.perf_counter() - saved_at >= 60 * self.training.checkpoint_minutes
                if due or last or stop.requested:
                    self._save()
                    saved_at = time.perf_counter()
                if last or stop.requested:
                    return last
                nats, count = answer_nats(self.model, self.batches[self.step], self.compute)
                self.scaler.scale(nats).backward()
                rate = learning_rate(self.training, self.step)
                loss, _ = self.update(nats.detach(), rate)
                self._append("train", train_loss=loss, learning_rate=rate, answer_tokens=count)
                progress.advance()

    def _evaluate(self, held_out: Sequence[Example]) -> None:
        rows = self.directory.rows("dev")
        if rows and rows[-1]["step"] == self.step:
            return
        loss = held_out_loss(self.model, held_out, self.compute)
        if not math.isfinite(loss):
            raise NonFinite(f"step {self.step}: the held-out answer loss is {loss}")
        self._append("dev", answer_loss=loss)

    def _append(self, kind: str, **values: Any) -> None:
        tokens = self.step * self.training.step_tokens
        self.directory.append(
            {"step": self.step, "tokens": tokens, "kind": kind, **values, "elapsed_s": self.seconds}
        )

    def _save(self) -> None:
        self.directory.sync()
        offset = self.directory.offset()
        self.save_state(self.directory.checkpoints, self.digests, metrics_offset=offset)


def _tuning_json(
    base: TrainedRun, rows: Sequence[dict[str, str]], losses: list[float], before: list[str]
) -> dict[str, Any]:
    """What tuning has changed; also said aloud."""
    texts = []
    for row, old, new in zip(rows, before, samples(base, rows), strict=False):
        texts.append(
            {"prompt": row["prompt"], "expected": row["answer"], "before": old, "after": new}
        )
        print(f"prompt: {row['prompt'][-160:]!r}\n  before: {old!r}\n  after:  {new!r}")
    name, first, last = base.path.name, losses[0], losses[-1]
    print(f"{name}: held-out answer loss {first:.4f} before, {last:.4f} after")
    return {
        "base": name,
        "answer_loss_before": first,
        "answer_loss_after": last,
        "answer_loss_by_epoch": losses,
        "samples": texts,
    }


# Of metrics.json: what the base run has said of the model, and what config.yaml says.
_BASE_KEYS = (
    *(quantity.built for quantity in REQUESTS),
    *"schema corpus vocab_size d_model n_layers n_heads head_dim d_ff embedding_dim".split(),
    *"tie_embeddings qk_norm attention_width_ratio flops_per_token".split(),
    *(f"params_{block}" for block in "embedding projection attention ffn norm".split()),
)
_CONFIG_KEYS = ("experiment", "phase", "seed", "tokenizer_sha256", "data_sha256")
_TRAINING_KEYS = ("batch_size", "seq_len", "learning_rate", "embedding_lr_ratio")


def _metrics(
    base: TrainedRun, resolved: dict[str, Any], digest: str, tuner: Tuner, wall: float
) -> dict[str, Any]:
    """metrics.json: what the run is and what it cost. Its losses are answers', not a corpus', so
    they stand in tuning.json alone."""
    base_metrics = read_json(base.path / "metrics.json")
    stamp = runtime.environment_stamp(tuner.compute.device)
    device_name = runtime.device_name(tuner.compute.device)
    return complete(
        {
            **{key: base_metrics.get(key) for key in _BASE_KEYS},
            **{key: resolved[key] for key in _CONFIG_KEYS},
            **{key: getattr(tuner.training, key) for key in _TRAINING_KEYS},
            "run": resolved["experiment"],
            "sweep": "instruction_tuning",
            "baseline": False,
            "status": "finished",
            "config_digest": digest,
            "git_sha": stamp.get("git_sha"),
            "git_dirty": stamp.get("git_dirty"),
            "tokens": tuner.step * tuner.training.step_tokens,
            "steps": tuner.step,
            "train_loss": final_loss(tuner.directory.rows("train")),
            "train_seconds": tuner.seconds,
            **computed(tuner.compute, device_name, wall),
        }
    )


# ------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(description="Tune a finished run on instructions.")
    parser.add_argument("--run", type=Path, required=True, help="logs/<run>, finished")
    parser.add_argument("--data", type=Path, required=True, help="of download_instructions.py")
    parser.add_argument("--log_dir", type=Path, help="default: where --run lies")
    parser.add_argument("--epochs", type=at_least(1), default=3)
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="examples")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    try:
        if not 0 < args.learning_rate <= 1:
            raise ValueError(f"--learning_rate: found {args.learning_rate}, expected 0 to 1")
        return tune(args)
    except Held as error:
        print(error, file=sys.stderr)
        return TRY_AGAIN
    except (ValueError, OSError) as error:
        return refuse(error)


if __name__ == "__main__":
    sys.exit(main())
