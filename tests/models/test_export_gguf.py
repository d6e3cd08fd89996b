"""The GGUF file holds the weights under llama.cpp's names, read by gguf's own reader."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from src.models.export import export
from tests import python
from tests.models import small_model

LAYERS, HEADS, HEAD_DIM = 2, 2, 16  # those of small_model


@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_weight_arrives(
    tokenizer_json: Path,
    tmp_path: Path,
    qk_norm: bool,
) -> None:
    final, output = tmp_path / "emb35" / "final", tmp_path / "emb35.gguf"
    final.parent.mkdir()
    model = small_model(qk_norm=qk_norm)
    export(model, tokenizer_json, final, max_position_embeddings=32)
    assert python("scripts/export_gguf.py", final, output).returncode == 0
    file = gguf.GGUFReader(output)
    gguf_weights = {tensor.name: np.array(tensor.data) for tensor in file.tensors}
    weights = load_file(final / "model.safetensors")
    assert len(gguf_weights) == len(weights)
    assert np.array_equal(gguf_weights["token_embd.weight"], weights["model.embed_tokens.weight"])
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        assert np.array_equal(
            gguf_weights[f"blk.{layer}.ffn_down.weight"], weights[f"{prefix}.mlp.down_proj.weight"]
        )
        queries = weights[f"{prefix}.self_attn.q_proj.weight"]
        if not qk_norm:  # row 2i + j of a head there is row i + j * head_dim / 2 here
            rows = [
                head * HEAD_DIM + i + j * HEAD_DIM // 2
                for head in range(HEADS)
                for i in range(HEAD_DIM // 2)
                for j in range(2)
            ]
            queries = queries[rows]
        assert np.array_equal(gguf_weights[f"blk.{layer}.attn_q.weight"], queries)
    assert file.fields["general.architecture"].contents() == ("qwen3" if qk_norm else "llama")
    assert file.fields["general.name"].contents() == "emb35"
    assert len(file.fields["tokenizer.ggml.tokens"].contents()) == model.config.vocab_size


def test_a_folder_without_a_checkpoint_is_refused_in_a_sentence(tmp_path: Path) -> None:
    process = python("scripts/export_gguf.py", tmp_path, tmp_path / "x.gguf")
    assert process.returncode == 78 and "config.json" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "x.gguf").exists()
