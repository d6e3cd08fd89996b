"""Small models of every exported shape, trained for seconds, and what the native model says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from src.data.tokenizer import END_OF_TEXT, load_tokenizer
from src.models.export import export
from src.models.transformer import Transformer
from src.spec.config import ModelConfig
from tests import ROOT

CONTEXT = 128  # tokens
NEW_TOKENS = 24  # of each greedy continuation
STEPS, BATCH, LENGTH = 60, 6, 64

# emb35's width and heads unless stated; 5 heads do not divide 224, 280 is emb45's width.
_BASE: dict[str, Any] = {
    "vocab_size": 1024, "d_model": 224, "n_layers": 2, "n_heads": 7, "head_dim": 32, "d_ff": 512,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "factorised": {"embedding_dim": 64},
    "factorised-untied": {"embedding_dim": 64, "tie_embeddings": False},
    "heads-16": {"n_heads": 14, "head_dim": 16},
    "heads-64": {"d_model": 256, "n_heads": 4, "head_dim": 64},
    "width-280": {"d_model": 280, "n_heads": 8},
    "undivided": {"n_heads": 5},
    "llama": {"qk_norm": False},
    "llama-untied": {"qk_norm": False, "tie_embeddings": False},
    "mistral": {"qk_norm": False, "n_heads": 5},
}

PROMPTS = ("The experiment ", "A run that", "python scripts/", "Every number ")
# Real text and what tokenizers stumble over: capitals, digits, accents, runs of blanks, emoji.
TEXTS = (
    "A finished run leaves its configuration, its metrics and a stock checkpoint behind.",
    "def f(x):\n    return  x+1   # 3.14159, don't\n\n\tdone",
    "Naïve cafés, Größe, 東京, Ελλάδα and 🦉🦉 in one line; I'll WE'LL they've",
    f" leading, trailing  \n\n and the text {END_OF_TEXT} spelt out ",
    "1234567890 2026-11-30 $5.00 100% e-mail@example.org",
)


def make(folder: Path) -> None:
    """`folder`/<variant>/final for every variant, and its reference.json.

    The reference: `texts` with their token ids and the native model's log-probability of each
    (nats, the end-of-text token first), `prompts` with theirs and the greedy continuation,
    and the text that follows the prompt alone, without the end-of-text token before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pages = [p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("docs/*.md"))]
    path = folder / "tokenizer.json"
    _train_tokenizer(pages, _BASE["vocab_size"], path)
    tokenizer = load_tokenizer(path)
    ids = [i for page in tokenizer.encode_batch(pages) for i in [0, *page.ids]]
    for name, changes in VARIANTS.items():
        model = _trained(ModelConfig(**(_BASE | changes)), torch.tensor(ids))
        export(model, path, folder / name / "final", max_position_embeddings=CONTEXT)
        reference = _reference(model, tokenizer)
        (folder / name / "reference.json").write_text(json.dumps(reference), encoding="utf-8")


def _train_tokenizer(texts: list[str], vocab_size: int, path: Path) -> None:
    """As src.data.tokenization trains the study's: byte-level BPE with GPT-2's word pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def _trained(config: ModelConfig, ids: torch.Tensor) -> Transformer:
    """Far from random, so that greedy text is decided by more than rounding."""
    torch.manual_seed(0)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        rows = torch.stack([ids[start : start + LENGTH + 1] for start in starts.tolist()])
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def _reference(model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    texts = []
    for text in TEXTS:
        token_ids = [0, *tokenizer.encode(text).ids][:CONTEXT]
        log_p = torch.log_softmax(model(torch.tensor([token_ids[:-1]]))[0].double(), dim=-1)
        targets = torch.tensor(token_ids[1:])
        scores = log_p.gather(1, targets[:, None])[:, 0]
        texts.append({"text": text, "ids": token_ids[1:], "log_probabilities": scores.tolist()})
    prompts = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        greedy, alone = (_greedy(model, token_ids) for token_ids in ([0, *ids], ids))
        prompts.append({"text": prompt, "ids": ids, "greedy": greedy,
                        "continued_alone": tokenizer.decode(alone)})  # fmt: skip
    return {"texts": texts, "prompts": prompts}


def _greedy(model: Transformer, prompt_ids: list[int]) -> list[int]:
    ids = list(prompt_ids)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def make_run(folder: Path) -> Path:
    """A short run of the quickstart's first experiment; returns its directory."""
    python, corpus, tokens = sys.executable, folder / "corpus", folder / "tokens"
    commands = [
        ["scripts/make_corpus.py", "--output", corpus],
        ["scripts/preprocess_lm.py", "--input", corpus, "--vocab_size", 512, "--output", tokens],
        ["run_experiment.py", "--config", "configs/quickstart_embed.yaml", "--exp", "quick-emb14",
         "--device", "cpu", "--log_dir", folder / "logs", "--set", f"data.dir={tokens}",
         "--set", "training.tokens=65536", "--set", "evaluation.metrics=[perplexity]"],
    ]  # fmt: skip
    for command in commands:
        subprocess.run([python, *map(str, command)], cwd=ROOT, check=True, stdout=sys.stderr)
    return folder / "logs" / "quick-emb14"
