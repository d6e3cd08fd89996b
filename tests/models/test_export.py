"""The exported checkpoint is a stock one, and says what the native model says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from src.data.tokenizer import load_tokenizer
from src.models.export import export
from src.models.transformer import Transformer
from src.spec.config import ModelConfig

TEXT = [
    "The café's 12 owls sleep; the river runs on and on.",
    "A naïve question:\nhow  many tokens is this?  ",
    "numbers 3.14 and words, words, words",
] * 20
EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def small_model(seed: int = 0, **changes: object) -> Transformer:
    values: dict[str, object] = {
        "vocab_size": 300,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 2,
        "head_dim": 16,  # attention width 32, not d_model
        "d_ff": 40,
    }
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(values | changes)))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        # gains away from 1 and weights large enough that a swapped matrix shows
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "table" in name:
                parameter.mul_(10)
            else:
                parameter.mul_(2)
    return model


@pytest.mark.parametrize(
    ("tied", "factorised", "qk_norm"), list(itertools.product((True, False), repeat=3))
)
def test_logits_equal_the_native_models(
    tied: bool, factorised: bool, qk_norm: bool, tokenizer_json: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = small_model(
        tie_embeddings=tied,
        embedding_dim=12 if factorised else None,
        qk_norm=qk_norm,
        rope_theta=500.0,
    )
    export(model, tokenizer_json, tmp_path / "final", max_position_embeddings=64)
    stock, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert stock.config.max_position_embeddings == 64
    assert stock.dtype == torch.float32
    tokens = torch.randint(0, 300, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens), stock(tokens).logits
    assert ours.abs().max() > 2  # there is something to disagree about
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    shared = stock.lm_head.weight.data_ptr() == stock.model.embed_tokens.weight.data_ptr()
    assert shared == tied


def test_tokenizer_gives_the_same_ids(tokenizer_json: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export(small_model(), tokenizer_json, tmp_path / "final", max_position_embeddings=64)
    ours = load_tokenizer(tokenizer_json)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "final")
    for text in [*TEXT[:3], "", " leading", "trailing ", f"{EOT}after", "a\n\n b , c ."]:
        assert theirs.encode(text) == theirs([text]).input_ids[0] == ours.encode(text).ids
        assert 0 not in ours.encode(text).ids  # a text that spells the token is a text
        assert theirs.decode(theirs.encode(text)) == text
    assert theirs.bos_token_id == theirs.eos_token_id == ours.token_to_id(EOT) == 0


def test_generation_follows_the_native_cache(tokenizer_json: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = small_model()
    export(model, tokenizer_json, tmp_path / "final", max_position_embeddings=64)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    prompt = torch.tensor([[0, 17, 200, 5]])
    theirs = stock.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    cache = model.new_cache(1, 16)
    ours, step = prompt, prompt
    with torch.no_grad():
        for _ in range(12):
            step = model(step, cache)[:, -1:].argmax(-1)
            ours = torch.cat((ours, step), dim=1)
    assert ours.tolist() == theirs.tolist()


def test_export_replaces_an_older_one_whole(tokenizer_json: Path, tmp_path: Path) -> None:
    place = tmp_path / "run" / "final"
    export(small_model(0), tokenizer_json, place, max_position_embeddings=64)
    (place / "left-over.txt").write_text("old")
    first = (place / "model.safetensors").read_bytes()
    export(small_model(1), tokenizer_json, place, max_position_embeddings=32)
    assert not (place / "left-over.txt").exists()
    assert (place / "model.safetensors").read_bytes() != first
    assert json.loads((place / "config.json").read_text())["max_position_embeddings"] == 32
    assert [path.name for path in place.parent.iterdir()] == ["final"]


def test_foreign_tokenizer_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most the model's 257 entries"):
        export(
            small_model(vocab_size=257), tokenizer_json, tmp_path / "f", max_position_embeddings=8
        )
    assert list(tmp_path.iterdir()) == []
