"""Three ways to train one architecture on the same tokens: ours, Hugging Face Trainer, and a plain
nanoGPT-style loop. Each is a child process that takes N optimizer steps whenever it is told to.

    peer(connection, Work) -> sends {"ready": start-up facts}, then for every N received
    {"seconds": wall of N steps, "loss": nats of the last}, and on None its peak memory.

Shapes: B sequences of a micro-batch, T tokens.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from src.spec.config import ModelConfig

STREAM_BATCHES = 16  # of random tokens that our own loop goes round


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What all peers do: the same architecture, batch, precision and device."""

    model: ModelConfig
    device: str  # cpu or cuda
    precision: str  # bf16, fp16 or fp32
    compile: bool
    threads: int
    batch_size: int  # sequences of an optimizer step
    seq_len: int
    micro_batch: int  # sequences
    learning_rate: float = 1e-3


def peer(connection: Connection, name: str, work: Work) -> None:
    """The child's whole life; errors are sent to the parent, which names them."""
    try:
        start = time.perf_counter()
        import torch

        from src.compute.runtime import keep_freed_memory

        torch.set_num_threads(work.threads)
        torch.manual_seed(0)
        if work.device == "cpu":
            keep_freed_memory()  # for all: without it they would only be slower
        imported = time.perf_counter() - start
        PEERS[name](connection, work, {"import_seconds": imported})
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"[:500]})
        raise


def _serve(connection: Connection, step: Callable[[], Any], work: Work, facts: dict) -> None:
    """First step apart (it compiles), then as many as asked for, until None."""
    start = time.perf_counter()
    float(step())
    facts["first_step_seconds"] = time.perf_counter() - start
    connection.send({"ready": facts})
    while (steps := connection.recv()) is not None:
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        connection.send({"loss": float(loss), "seconds": time.perf_counter() - start})
    connection.send({"peak_mib": peak_mib(work.device)})


def peak_mib(device: str) -> float:
    """Most memory of this process: of the GPU's allocator, or resident on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _batches(work: Work) -> Callable[[], Any]:
    """(batch_size, T + 1) uniform random tokens, the same sequence for both other peers."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (work.batch_size, work.seq_len + 1)
    return lambda: torch.randint(work.model.vocab_size, shape, generator=generator)


# ------------------------------------------------------------------------------------------ ours


def ours(connection: Connection, work: Work, facts: dict) -> None:
    """The training step itself (`src.training_step.Stepper`), with one wait for the device."""
    import numpy as np
    import torch

    from src.compute.compute_config import LOSS_CHUNK, ComputeConfig
    from src.data.tokens import Windows
    from src.models.transformer import Transformer
    from src.spec.config import TrainingConfig
    from src.training_step import Stepper, compile_blocks

    training = TrainingConfig(batch_size=work.batch_size, seq_len=work.seq_len)
    compute = ComputeConfig(
        device=torch.device(work.device), precision=work.precision, micro_batch=work.micro_batch,
        compile=work.compile, threads=work.threads, loss_chunk=LOSS_CHUNK[work.device],
    )  # fmt: skip
    stepper = Stepper(Transformer(work.model).to(compute.device), training, compute)
    compile_blocks(stepper.model, compute)
    count = STREAM_BATCHES * work.batch_size * work.seq_len + 1
    stream = np.random.default_rng(1).integers(work.model.vocab_size, size=count, dtype=np.uint16)
    windows = Windows(stream, batch_size=work.batch_size, seq_len=work.seq_len, seed=0)

    def step() -> float:
        batch = torch.from_numpy(windows.batch(stepper.step))
        return stepper.update(stepper.gradients(batch), work.learning_rate)[0]

    _serve(connection, step, work, facts)


# --------------------------------------------------------------------------------------- nanoGPT


def nanogpt(connection: Connection, work: Work, facts: dict) -> None:
    """A plain loop as nanoGPT's: the whole model with its loss compiled, bf16 autocast, fused
    AdamW, clipping, micro-steps; the architecture is ours (benchmarks/plain_model.py)."""
    import torch

    from benchmarks.plain_model import PlainModel

    device = torch.device(work.device)
    model: Any = PlainModel(work.model).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=work.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(work.precision)
    scaler = torch.amp.GradScaler(work.device, enabled=work.precision == "fp16")
    forward = torch.compile(model, dynamic=False) if work.compile else model
    batches = _batches(work)

    def step() -> Any:
        batch = batches()
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        parts = batch.split(work.micro_batch)
        for part in parts:
            with torch.autocast(work.device, dtype, enabled=dtype is not None):
                loss = forward(part[:, :-1], part[:, 1:]) / len(parts)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach() * len(parts)

    _serve(connection, step, work, facts)


# --------------------------------------------------------------------------------------- Trainer


def trainer(connection: Connection, work: Work, facts: dict) -> None:
    """Hugging Face Trainer on the stock architecture that `final/` exports to."""
    import tempfile

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    from src.models.export import _config

    stock = AutoConfig.for_model(**_stock(_config(work.model, work.seq_len, 0)))
    model = AutoModelForCausalLM.from_config(stock, attn_implementation="sdpa")
    batches = _batches(work)

    class Tokens(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                for row in batches():
                    row = row[:-1]  # Trainer's models shift by themselves
                    yield {"input_ids": row, "labels": row}

    state = {"left": 1, "first": True, "start": time.perf_counter()}

    class Remote(TrainerCallback):
        """Hands control to the parent whenever the steps asked for are done."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if state["left"] == 0:
                steps = connection.recv()
                if steps is None:
                    connection.send({"peak_mib": peak_mib(work.device)})
                    sys.exit(0)
                state["left"], state["start"] = steps, time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            state["left"] -= 1
            if state["left"]:
                return
            if work.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - state["start"]
            if state["first"]:
                state["first"] = False
                connection.send({"ready": facts | {"first_step_seconds": seconds}})
            else:
                connection.send({"loss": None, "seconds": seconds})

    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(
            output_dir=folder, max_steps=10**9, per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=work.batch_size // work.micro_batch,
            learning_rate=work.learning_rate, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
            bf16=work.precision == "bf16", fp16=work.precision == "fp16",
            torch_compile=work.compile, optim="adamw_torch_fused", use_cpu=work.device == "cpu",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_num_workers=0,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=[Remote()]).train()


def _stock(values: dict[str, Any]) -> dict[str, Any]:
    kept = json.loads(json.dumps(values))
    for name in ("architectures", "dtype", "torch_dtype", "rope_theta"):
        kept.pop(name, None)
    return kept | {"use_cache": False}


PEERS: dict[str, Callable[[Connection, Work, dict], None]] = {
    "ours": ours,
    "nanogpt": nanogpt,
    "trainer": trainer,
}
