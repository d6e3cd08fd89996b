"""What a run chooses by itself: device, precision, micro-batch, loss chunk, compilation, threads.

Chosen once per log directory and device, stored in `choices.json`, reused by every run that is
compared and by every resumption; whatever the config states wins.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from src.compute import autotune, runtime
from src.compute.compiler import compiler
from src.spec.config import ModelConfig, TrainingConfig
from src.spec.progress import say
from src.storage import choices

# Most tokens of a CPU micro-batch: eager, activations of one block should stay in the cache;
# compiled, 1,024 to 8,192 tokens are equally fast (10M model, two cores; benchmarks/NOTES.md).
CPU_MICRO_BATCH_TOKENS = 2_048
# Logits rows at a time where nothing is timed: on a CPU (chunk, V) stays near the cache.
LOSS_CHUNK = {"cpu": 512, "cuda": 8_192}
# Under this budget compiling (11-17 s a block shape on two cores) and autotuning (3 to 10 s there,
# and some seconds for each of three compiled chunks) cost more than they give.
COMPILE_PAYS_TOKENS = 1_000_000
# Values kept for the backward pass a token and layer, in units of d_model, the FFN's beside it:
# an estimate from counting tensors, not yet checked on a GPU.
_ACTIVATION_UNITS = 40
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """How this process computes; equal for everything that is compared."""

    device: torch.device
    precision: str  # fp32, bf16 or fp16
    micro_batch: int  # sequences
    compile: bool
    threads: int
    loss_chunk: int = 512  # rows of logits at a time

    @property
    def dtype(self) -> torch.dtype:
        """The type of matrix products."""
        return DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`, the rest in float32."""
        low = self.precision != "fp32"
        return torch.autocast(self.device.type, self.dtype if low else torch.bfloat16, enabled=low)


def choose(
    training: TrainingConfig,
    model: ModelConfig,
    log_dir: Path,
    requested_device: str,
    name: str = "autotune",
) -> ComputeConfig:
    """Pin threads and choose; raises ValueError for what this machine cannot do.

    name: the run's, for the line that says why it does not begin yet.
    """
    device = runtime.choose_device(requested_device)
    if training.deterministic:
        runtime.deterministic()  # first: cuBLAS reads its setting when autotuning starts it
    if device.type == "cpu":
        runtime.keep_freed_memory()

    def decide() -> dict[str, object]:
        say(name, "choosing precision and threads for this device, some seconds")
        # Nothing here may depend on one run's settings: the next run of the directory reads it.
        return {
            "threads": runtime.pin_threads(None),
            "precision": runtime.resolve_precision(
                "auto",
                device,
                d_model=model.d_model,
                d_ff=model.d_ff,
                vocab_size=model.vocab_size,
            ),
            "micro_batch_tokens": _micro_batch_tokens(device, model),
            "can_compile": _can_compile(device),
        }

    key = runtime.device_name(device)
    stored = choices.get(
        log_dir, key, decide,
        {"threads": int, "precision": str, "micro_batch_tokens": int, "can_compile": bool},
    )  # fmt: skip
    threads = runtime.pin_threads(training.threads or int(stored["threads"]))
    precision = str(stored["precision"])
    if training.precision != "auto":
        precision = runtime.resolve_precision(training.precision, device)
    pays = training.tokens >= COMPILE_PAYS_TOKENS
    if training.compile == "auto" and pays and not stored["can_compile"]:
        print("training.compile: no C++ compiler (on a GPU, or no Triton) found, so eager")
    compiled = bool(stored["can_compile"]) and pays
    if training.compile != "auto":
        compiled = training.compile == "on"
    most_tokens = int(stored["micro_batch_tokens"])
    loss_chunk = LOSS_CHUNK[device.type]
    if pays and not (training.micro_batch and training.loss_chunk):

        def measure() -> dict[str, object]:
            say(name, "timing micro-batches and loss chunks, up to half a minute, once a sweep")
            return autotune.measure(
                model,
                training.seq_len,
                device=device,
                dtype=DTYPES[precision],
                most_tokens=most_tokens,
                compiled=compiled,
            )

        # Of the first such run's model and precision; then the same for all that is compared.
        fastest = choices.get(
            log_dir,
            f"{key}, {precision}, {training.seq_len} tokens a sequence"
            + (", compiled" if compiled else ""),
            measure,
            {"micro_batch_tokens": int, "loss_chunk": int},
        )
        most_tokens, loss_chunk = int(fastest["micro_batch_tokens"]), int(fastest["loss_chunk"])
    most_sequences = max(1, most_tokens // training.seq_len)
    return ComputeConfig(
        device=device,
        precision=precision,
        micro_batch=training.micro_batch or _largest_divisor(training.batch_size, most_sequences),
        compile=compiled,
        threads=threads,
        loss_chunk=training.loss_chunk or loss_chunk,
    )


def _largest_divisor(number: int, most: int) -> int:
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _micro_batch_tokens(device: torch.device, model: ModelConfig) -> int:
    if device.type == "cpu":
        return CPU_MICRO_BATCH_TOKENS
    # A quarter of the card: the PRD's loop starts three or four runs at once on one GPU.
    _, total = torch.cuda.mem_get_info(device)
    width = _ACTIVATION_UNITS * model.d_model + 8 * model.d_ff
    bytes_per_token = 2 * model.n_layers * width + 8 * model.vocab_size
    return int(0.25 * total / bytes_per_token)


def _can_compile(device: torch.device) -> bool:
    """Inductor needs a C++ compiler on a CPU and Triton on a GPU (and a C compiler for it)."""
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        return False
    return compiler() is not None
