"""The exported checkpoint is a stock one, and says what the native model says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from jinja2 import TemplateError

from src.data.chat_template import CLOSING, OPENING, chat_template
from src.data.tokenizer import load_tokenizer
from src.instruction_tuning import encode
from src.models.export import NotLoadable, export
from tests.conftest import TEXT
from tests.models import EOT, small_model


@pytest.mark.parametrize(
    ("tied", "factorised", "qk_norm", "n_heads"),
    # d_model is 24: 2 heads divide it, 5 do not
    list(itertools.product((True, False), (True, False), (True, False), (2, 5))),
)
def test_logits_equal_the_native_models(
    tied: bool, factorised: bool, qk_norm: bool, n_heads: int, tokenizer_json: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = small_model(
        tie_embeddings=tied,
        embedding_dim=12 if factorised else None,
        qk_norm=qk_norm,
        n_heads=n_heads,
        rope_theta=500.0,
    )
    export(model, tokenizer_json, tmp_path / "final", max_position_embeddings=64)
    stock, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    without_qk_norm = "LlamaForCausalLM" if n_heads == 2 else "MistralForCausalLM"
    assert type(stock).__name__ == ("Qwen3ForCausalLM" if qk_norm else without_qk_norm)
    assert getattr(stock.config, "sliding_window", None) is None
    assert stock.config.max_position_embeddings == 64
    assert stock.dtype == torch.float32
    tokens = torch.randint(0, 300, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        native, exported = model(tokens), stock(tokens).logits
    assert native.abs().max() > 2  # there is something to disagree about
    torch.testing.assert_close(native, exported, atol=1e-4, rtol=0)
    shared = stock.lm_head.weight.data_ptr() == stock.model.embed_tokens.weight.data_ptr()
    assert shared == tied


def test_tokenizer_gives_the_same_ids(tokenizer_json: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export(small_model(), tokenizer_json, tmp_path / "final", max_position_embeddings=64)
    native = load_tokenizer(tokenizer_json)
    exported = AutoTokenizer.from_pretrained(tmp_path / "final")
    for text in [*TEXT[:3], "", " leading", "trailing ", f"{EOT}after", "a\n\n b , c ."]:
        assert exported.encode(text) == exported([text]).input_ids[0] == native.encode(text).ids
        assert 0 not in native.encode(text).ids  # a text that spells the token is a text
        assert exported.decode(exported.encode(text)) == text
    assert exported.bos_token_id == exported.eos_token_id == native.token_to_id(EOT) == 0


def test_a_batch_goes_on_behind_its_texts(tokenizer_json: Path, tmp_path: Path) -> None:
    """Padding on the left, and no input that generate() does not know."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = tmp_path / "final"
    export(small_model(), tokenizer_json, final, max_position_embeddings=64)
    stock = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    texts = ["the owls", "a question of how many tokens this is"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = tokenizer(texts, return_tensors="pt", padding=True)
    assert set(together) == {"input_ids", "attention_mask"}
    generated = stock.generate(**together, **options)[:, together.input_ids.shape[1] :]
    for text, continued in zip(texts, generated, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        whole = stock.generate(**alone, **options)[0]
        assert whole[alone.input_ids.shape[1] :].tolist() == continued.tolist()


@pytest.mark.parametrize("wording", [("", ""), (OPENING, CLOSING)], ids=["plain", "alpaca"])
def test_a_chat_is_written_as_in_tuning(
    wording: tuple[str, str], tokenizer_json: Path, tmp_path: Path
) -> None:
    """For the answer alone, and with the answer: the very ids that the model was tuned on."""
    from transformers import AutoTokenizer

    instructions = ["How many owls\n\nsleep?", 'a "naïve" {{ question }} \\n', "words:"]
    before, after = wording
    prompts = [before + text + after for text in instructions]
    template = chat_template(prompts)
    final = tmp_path / "final"
    options = {"max_position_embeddings": 64, "chat_template": template}
    export(small_model(), tokenizer_json, final, **options)
    tokenizer = AutoTokenizer.from_pretrained(final)
    for text, prompt in zip(instructions, prompts, strict=True):
        example = encode(load_tokenizer(tokenizer_json), prompt, "on and on.", 1000)
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, tokenize=True
        )
        assert ids == example.ids[: example.answer_start].tolist()
        answered = [*messages, {"role": "assistant", "content": "on and on."}]
        whole = tokenizer.apply_chat_template(answered, return_dict=False, tokenize=True)
        assert whole == example.ids.tolist()
    with pytest.raises(TemplateError, match="user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be kind"}], tokenize=True)


def test_the_model_is_called_as_its_run(tokenizer_json: Path, tmp_path: Path) -> None:
    """llama.cpp's converter reads `model_name` in the head of the model card."""
    export(small_model(), tokenizer_json, tmp_path / "emb35" / "final", max_position_embeddings=64)
    head = (tmp_path / "emb35" / "final" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(head)["model_name"] == "emb35"


def test_what_transformers_refuses_is_no_export(
    tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Llama whose heads do not divide its width: one sentence, and nothing is left."""
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    monkeypatch.setattr("src.models.export._architecture", lambda config: llama)
    model = small_model(qk_norm=False, n_heads=5)
    with pytest.raises(NotLoadable, match="24.* not a multiple of .*5") as refused:
        export(model, tokenizer_json, tmp_path / "final", max_position_embeddings=64)
    assert "checkpoints/" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_generation_follows_the_native_cache(tokenizer_json: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = small_model()
    export(model, tokenizer_json, tmp_path / "final", max_position_embeddings=64)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    prompt = torch.tensor([[0, 17, 200, 5]])
    exported = stock.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    cache = model.new_cache(1, 16)
    native, step = prompt, prompt
    with torch.no_grad():
        for _ in range(12):
            step = model(step, cache)[:, -1:].argmax(-1)
            native = torch.cat((native, step), dim=1)
    assert native.tolist() == exported.tolist()


def test_export_replaces_an_older_one_whole(tokenizer_json: Path, tmp_path: Path) -> None:
    final = tmp_path / "run" / "final"
    export(small_model(0), tokenizer_json, final, max_position_embeddings=64)
    (final / "left-over.txt").write_text("old")
    first = (final / "model.safetensors").read_bytes()
    export(small_model(1), tokenizer_json, final, max_position_embeddings=32)
    assert not (final / "left-over.txt").exists()
    assert (final / "model.safetensors").read_bytes() != first
    assert json.loads((final / "config.json").read_text())["max_position_embeddings"] == 32
    assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_foreign_tokenizer_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most the model's 257 entries"):
        export(
            small_model(vocab_size=257), tokenizer_json, tmp_path / "f", max_position_embeddings=8
        )
    assert list(tmp_path.iterdir()) == []
