"""A trained model as a stock Hugging Face checkpoint: Qwen3, Llama or Mistral, by its shape.

Stock models have no embedding projection, so a factorised table is folded into V x D; parameter
counts, memory and latency always come from the native model. docs/INTEROP.md lists what was tried.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from src.data.tokenizer import END_OF_TEXT, load_tokenizer
from src.models.transformer import Attention, Block, Embedding, SwiGLU, Transformer
from src.spec.config import ModelConfig
from src.storage.files import replace_directory, scratch_directory, write_json


class NotLoadable(Exception):
    """transformers refuses the checkpoint just written."""


def export(
    model: Transformer,
    tokenizer_json: Path,
    out_dir: Path,
    *,
    max_position_embeddings: int,
    chat_template: str | None = None,
) -> None:
    """Write `out_dir` so that AutoModelForCausalLM and AutoTokenizer load it as it is.

    Weights are float32 and logits equal the native model's within 1e-4.
    `max_position_embeddings` is the sequence length trained on; `chat_template` is Jinja2, of a
    tuned model. The directory that holds `out_dir` names the model. `out_dir` appears whole, once
    transformers has loaded it: it is built beside its place and renamed, an older one is replaced.
    Raises ValueError if the tokenizer has no `<|endoftext|>` or not the model's vocabulary, and
    NotLoadable if transformers does not load what was written.
    """
    tokenizer = load_tokenizer(tokenizer_json)
    eot = tokenizer.token_to_id(END_OF_TEXT)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if eot is None or size > model.config.vocab_size:
        raise ValueError(
            f"{tokenizer_json}: found {size} entries and {END_OF_TEXT} as {eot}, expected this "
            f"token and at most the model's {model.config.vocab_size} entries; export with the "
            "run's tokenizer"
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(out_dir.with_name(f".{out_dir.name}-part")) as building:
        save_file(_weights(model), building / "model.safetensors", metadata={"format": "pt"})
        write_json(building / "config.json", _config(model.config, max_position_embeddings, eot))
        generation = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
        write_json(building / "generation_config.json", generation)
        shutil.copyfile(tokenizer_json, building / "tokenizer.json")
        settings = _tokenizer(max_position_embeddings, chat_template)
        write_json(building / "tokenizer_config.json", settings)
        (building / "README.md").write_text(_card(out_dir.resolve().parent.name), encoding="utf-8")
        _load_once(building)
        replace_directory(building, out_dir)


def _load_once(folder: Path) -> None:
    """No run ends "finished" with a checkpoint that the pinned transformers cannot load.

    Imported here: it costs two to three seconds of one core, which only a finished run pays.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of any type: its configurations raise their own
        problem = f"{type(error).__name__}: {error}"
    else:
        problem = "; ".join(f"{key} {names}" for key, names in loaded[1].items() if names)
    if problem:
        raise NotLoadable(
            f"the exported checkpoint: found that transformers does not load it ({problem}), "
            "expected a model and a tokenizer; the run's weights are safe in checkpoints/"
        )


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The stock class that most programs load, and the keys that it alone has.

    Only Qwen3 has QK-norm. transformers 5 refuses a Llama whose hidden size the heads do not
    divide, though head_dim is stated; a Mistral without its window computes the same.
    """
    if config.qk_norm:
        qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        # No window, said in full: mistral.rs refuses a file without max_window_layers.
        window = {"use_sliding_window": False, "max_window_layers": config.n_layers}
        return qwen3 | window | {"sliding_window": None}
    if config.d_model % config.n_heads == 0:
        llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        return llama | {"mlp_bias": False}
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return mistral | {"sliding_window": None}


def _config(config: ModelConfig, max_position_embeddings: int, eot: int) -> dict[str, Any]:
    return _architecture(config) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        # Both spellings: transformers 5 and vLLM read rope_parameters, older tools rope_theta.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "pad_token_id": eot,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _tokenizer(max_position_embeddings: int, chat_template: str | None) -> dict[str, Any]:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        # Bytes leave nothing unknown, but CTranslate2 wants a name for it.
        "unk_token": END_OF_TEXT,
        "model_max_length": max_position_embeddings,
        # transformers 4 adds token_type_ids unless told, and generate() refuses them.
        "model_input_names": ["input_ids", "attention_mask"],
        # On the right, a batch would go on behind the padding.
        "padding_side": "left",
        # A text that spells the token is a text, as it was in training; a chat template has to
        # spell it, so there it is the token.
        "split_special_tokens": chat_template is None,
        # Scores need ids that decode to the very text: no space is tidied away.
        "clean_up_tokenization_spaces": False,
    }
    return settings if chat_template is None else settings | {"chat_template": chat_template}


def _card(name: str) -> str:
    """The model card; llama.cpp's converter takes `general.name` from its head."""
    return f"---\nmodel_name: {json.dumps(name)}\npipeline_tag: text-generation\n---\n\n# {name}\n"


def _weights(model: Transformer) -> dict[str, Tensor]:
    weights = {
        "model.embed_tokens.weight": _folded(model.embedding),
        "model.norm.weight": model.norm.weight,
    }
    if not model.config.tie_embeddings:
        weights["lm_head.weight"] = _folded(model.head)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for name, weight in _block_weights(block).items():
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    return {
        name: weight.detach().to("cpu", torch.float32).contiguous().clone()
        for name, weight in weights.items()
    }


def _folded(embedding: Embedding) -> Tensor:
    """(V, D): the table, multiplied with its projection where it has one.

    The same product serves both ends: rows of table @ projection are the input embeddings, and
    hidden @ projection.T @ table.T are the logits; so a tied factorised pair stays tied.
    """
    if embedding.projection is None:
        return embedding.table
    product = embedding.table.detach().double() @ embedding.projection.detach().double()
    return product.float()


def _block_weights(block: Block) -> dict[str, Tensor]:
    attention, ffn = block.attention, block.ffn
    assert isinstance(attention, Attention) and isinstance(ffn, SwiGLU)
    q, k, v = attention.qkv.weight.chunk(3)  # each (A, D)
    gate, up = ffn.gate_up.weight.chunk(2)  # each (F, D)
    weights = {
        "input_layernorm": block.attention_norm.weight,
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.o_proj": attention.out.weight,
        "post_attention_layernorm": block.ffn_norm.weight,
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": ffn.down.weight,
    }
    if attention.q_norm is not None and attention.k_norm is not None:
        weights["self_attn.q_norm"] = attention.q_norm.weight
        weights["self_attn.k_norm"] = attention.k_norm.weight
    return weights
