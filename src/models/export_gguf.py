"""A run's final/ as a float32 GGUF file for llama.cpp, without its converter. Needs pip's gguf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src.spec.command_line import Parser, Refusal

# The exported names and llama.cpp's.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def main() -> None:
    parser = Parser((__doc__ or "").strip(), example="export_gguf.py logs/emb35/final emb35.gguf")
    parser.add_argument("final", type=Path, help="the folder final/ of a finished run")
    parser.add_argument("output", type=Path, help="the file to write")
    args = parser.parse_args()
    if not (args.final / "config.json").is_file():
        raise Refusal(f"{args.final}: found no config.json, expected the folder final/ of a run")
    try:
        import gguf
        from safetensors.numpy import load_file
    except ImportError as error:
        raise Refusal(f"found no {error.name}, expected it: pip install gguf==0.19.0") from None
    config = json.loads((args.final / "config.json").read_bytes())
    llama = config["model_type"] != "qwen3"  # a Mistral without its window is a Llama there
    writer = gguf.GGUFWriter(args.output, "llama" if llama else "qwen3")
    writer.add_name(args.final.resolve().parent.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, args.final, config["vocab_size"])
    for name, weight in load_file(args.final / "model.safetensors").items():
        if llama and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates a Llama's neighbouring dimensions, transformers its halves.
            halves = weight.reshape(config["num_attention_heads"], 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(_name(name.removesuffix(".weight")) + ".weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(args.output)


def _name(name: str) -> str:
    if not name.startswith("model.layers."):
        return NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}"


def _add_tokenizer(writer: Any, final: Path, vocab_size: int) -> None:
    """Byte-level BPE with GPT-2's word pattern; ids that the tokenizer lacks are unused."""
    tokenizer = json.loads((final / "tokenizer.json").read_bytes())
    settings = json.loads((final / "tokenizer_config.json").read_bytes())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {i: token for token, i in tokenizer["model"]["vocab"].items()} | special
    kinds = [5 if i not in by_id else 3 if i in special else 1 for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(i, f"[unused{i}]") for i in range(vocab_size)])
    writer.add_token_types(kinds)  # 1 normal, 3 control, 5 unused
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    end = next(i for i, token in special.items() if token == settings["eos_token"])
    for add_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add_id(end)
    writer.add_add_bos_token(False)
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])
