"""The model: causal, equal with and without a cache, well initialised, deterministic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from src.models.loss import chunked_cross_entropy
from src.models.transformer import (
    CPU_SHORT_SEQUENCE,
    QUERY_BLOCK,
    Transformer,
    blockwise_attention,
    causal_attention,
    rope_tables,
    rotate,
)
from src.spec.allocation import allocate
from src.spec.config import ModelConfig, load_sweep
from tests import ROOT

CONFIGS = ROOT / "configs"
CONFIG = ModelConfig(vocab_size=61, d_model=32, n_layers=3, n_heads=3, head_dim=16, d_ff=72)
VARIANTS = {
    "plain": CONFIG,
    "untied": replace(CONFIG, tie_embeddings=False),
    "factorised": replace(CONFIG, embedding_dim=12),
    "untied, factorised": replace(CONFIG, embedding_dim=12, tie_embeddings=False),
    "without QK-norm": replace(CONFIG, qk_norm=False),
}


def prd_configs() -> dict[str, ModelConfig]:
    configs: dict[str, ModelConfig] = {}
    for sweep in ("embed_ratio", "glu_expansion"):
        runs = load_sweep(CONFIGS / f"{sweep}.yaml").runs
        allocations = allocate({run.experiment: run.model for run in runs}, runs[0].baseline)
        configs |= {name: allocation.model for name, allocation in allocations.items()}
    return configs


def make(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config)


def tokens_of(batch: int, length: int, vocab: int = CONFIG.vocab_size, seed: int = 1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS)
def model(request) -> Transformer:
    return make(VARIANTS[request.param])


def test_no_output_depends_on_a_later_token(model):
    """Causality by gradient: d logits[t] / d embedding[s] is zero exactly for s > t."""
    tokens = tokens_of(1, 12)
    embed, embedded = model.embedding.embed, []

    def keeping(ids):
        embedded.append(embed(ids))
        embedded[-1].retain_grad()
        return embedded[-1]

    model.embedding.embed = keeping
    for t in (0, 5, 11):
        embedded.clear()
        model(tokens)[0, t].square().sum().backward()
        (x,) = embedded
        assert x.grad is not None
        reached = x.grad[0].abs().sum(dim=-1)
        assert (reached[t + 1 :] == 0).all()
        assert (reached[: t + 1] > 0).all()


def test_every_parameter_is_used(model):
    model(tokens_of(2, 8)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 9, 3], [1, 19]])
def test_decoding_with_a_cache_equals_the_full_pass(model, chunks):
    tokens = tokens_of(2, sum(chunks))
    with torch.no_grad():
        full = model(tokens)
        cache = model.new_cache(2, sum(chunks))
        pieces = [model(piece, cache) for piece in tokens.split(chunks, dim=1)]
    assert cache.length == sum(chunks)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-5, rtol=1e-5)


def test_a_cache_takes_what_its_dtype_says():
    cache = make(CONFIG).new_cache(2, 50, torch.bfloat16)
    assert cache.nbytes() == 2 * 3 * 2 * 3 * 50 * 16 * 2
    model = make(CONFIG)
    tokens = tokens_of(1, 9)
    with torch.no_grad():
        full = model(tokens)
        cache = model.new_cache(1, 9, torch.bfloat16)
        pieces = torch.cat([model(piece, cache) for piece in tokens.split([4, 5], dim=1)], dim=1)
    assert pieces.dtype == torch.float32
    torch.testing.assert_close(pieces, full, atol=0.02, rtol=0.0)


def test_any_length_can_be_read_after_a_shorter_one():
    model = make(CONFIG)
    with torch.no_grad():
        short = model(tokens_of(1, 700)[:, :10])
        long = model(tokens_of(1, 700))
        again = model(tokens_of(1, 700)[:, :10])
    assert torch.equal(short, again)
    torch.testing.assert_close(long[:, :10], short, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("experiment", prd_configs())
def test_the_first_loss_is_near_ln_v_in_every_prd_experiment(experiment):
    config = prd_configs()[experiment]
    model = make(config)
    tokens = tokens_of(2, 65, config.vocab_size)
    with torch.no_grad():
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        objective, loss = chunked_cross_entropy(
            model.head.head_input(hidden), model.head.table, tokens[:, 1:].flatten(), 0.0
        )
        # Text repeats its tokens; a tied table favours the token just read.
        repeated = tokens[:, :1].expand(2, 33)
        repeated_hidden = model.hidden(repeated[:, :-1]).flatten(0, 1)
        _, repeated_loss = chunked_cross_entropy(
            model.head.head_input(repeated_hidden), model.head.table, repeated[:, 1:].flatten(), 0.0
        )
    assert objective == loss
    assert abs(float(loss) - math.log(config.vocab_size)) < 0.1
    assert float(repeated_loss) < math.log(config.vocab_size) + 0.1


def test_rope_depends_on_relative_positions_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=generator)
    rope = rope_tables(400, 64, 10_000.0, torch.device("cpu"))

    def score(i: int, j: int) -> float:
        return float((rotate(q, rope[:, i : i + 1]) * rotate(k, rope[:, j : j + 1])).sum())

    for distance in (0, 1, 17, 100):
        scores = [score(start + distance, start) for start in (0, 3, 111, 299)]
        assert max(scores) - min(scores) < 1e-3 * float(q.norm() * k.norm())
    assert abs(score(17, 0) - score(0, 17)) > 1e-2  # direction matters
    assert float(rotate(q, rope[:, 5:6]).norm()) == pytest.approx(float(q.norm()), rel=1e-5)
    assert torch.equal(rotate(q, rope[:, :1]), q)


def test_rope_pairs_halves_as_hugging_face_does():
    rope = rope_tables(3, 4, 100.0, torch.device("cpu"))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    angles = [2.0, 2.0 * 100.0 ** (-2 / 4)]  # position 2, pairs (0, 2) and (1, 3)
    expected = [
        1 * math.cos(angles[0]) - 3 * math.sin(angles[0]),
        2 * math.cos(angles[1]) - 4 * math.sin(angles[1]),
        3 * math.cos(angles[0]) + 1 * math.sin(angles[0]),
        4 * math.cos(angles[1]) + 2 * math.sin(angles[1]),
    ]
    torch.testing.assert_close(rotate(x, rope[:, 2:3]).flatten(), torch.tensor(expected))


def test_initial_weights_have_the_stated_spread():
    config = ModelConfig(vocab_size=999, d_model=128, n_layers=6, n_heads=4, head_dim=32, d_ff=344)
    model = make(config)
    block: Any = model.blocks[0]
    sd = math.sqrt(2 / (5 * 128))
    spread = {
        model.embedding.table: 0.02,
        block.attention.qkv.weight: sd,
        block.ffn.gate_up.weight: sd,
        block.attention.out.weight: sd / math.sqrt(12),
        block.ffn.down.weight: sd / math.sqrt(12),
    }
    for weight, expected in spread.items():
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.03)
    assert all((p == 1).all() for p in model.parameters() if p.ndim == 1)


def test_the_same_seed_gives_the_same_bits():
    tokens = tokens_of(3, 17)

    def run(seed: int) -> list[torch.Tensor]:
        model = make(CONFIG, seed)
        logits = model(tokens)
        logits.square().mean().backward()
        grads = [parameter.grad for parameter in model.parameters()]
        return [logits.detach(), *[grad for grad in grads if grad is not None]]

    first, second, other = run(3), run(3), run(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_batches_do_not_mix():
    model = make(CONFIG)
    tokens = tokens_of(4, 11)
    with torch.no_grad():
        together = model(tokens)
        alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_stays_near_float32(dtype):
    model = make(CONFIG)
    tokens = tokens_of(2, 16)
    with torch.no_grad():
        exact = model(tokens)
        with torch.autocast("cpu", dtype):
            rough = model(tokens)
    # bf16 keeps 8 bits: 0.4 % a product, some of them in a row.
    assert float((rough - exact).abs().max()) < 0.03 * float(exact.abs().max()) + 0.01


def value_and_gradients(attention, parts, upstream):
    q, k, v = (part.float().requires_grad_() for part in parts)
    y = attention(q, k, v).float()
    return y.detach(), *torch.autograd.grad((y * upstream).sum(), (q, k, v))


def softmax_written_out(q, k, v):
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(future, float("-inf"))
    return scores.softmax(-1) @ v


def attention_problem(length, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, length, 8)
    parts = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    return parts, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("length", [1, 17, CPU_SHORT_SEQUENCE + 1])
@pytest.mark.parametrize("low", [False, True])
def test_attention_equals_softmax_written_out(length, low):
    """Also under autocast, where short sequences of a CPU stay in float32."""
    dtype = torch.bfloat16 if low else torch.float32
    parts, upstream = attention_problem(length, dtype)

    def fast(q, k, v):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return causal_attention(q.to(dtype), k.to(dtype), v.to(dtype))

    exact = not low or length <= CPU_SHORT_SEQUENCE
    references = value_and_gradients(softmax_written_out, parts, upstream)
    results = value_and_gradients(fast, parts, upstream)
    for actual, expected in zip(results, references, strict=True):
        if exact and not low:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        else:  # gradients are rounded to bf16 on their way back through the casts
            bound = 0.01 if exact else 0.03
            # One token attends to itself alone: its scores have no gradient but rounding.
            assert float((actual - expected).norm()) <= bound * float(expected.norm()) + 1e-5


@pytest.mark.parametrize("length", [1, 17, QUERY_BLOCK, QUERY_BLOCK + 1, CPU_SHORT_SEQUENCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockwise_attention_equals_softmax_written_out(length, dtype):
    parts, upstream = attention_problem(length, dtype)

    def blocks(q, k, v):
        return blockwise_attention(q.to(dtype), k.to(dtype), v.to(dtype))

    references = value_and_gradients(softmax_written_out, parts, upstream)
    results = value_and_gradients(blocks, parts, upstream)
    for actual, expected in zip(results, references, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        else:  # bf16 keeps 8 bits; scores and weights are rounded to it
            assert float((actual - expected).norm()) <= 0.01 * float(expected.norm()) + 1e-6


def test_blockwise_attention_sees_no_later_token():
    (q, k, v), _ = attention_problem(QUERY_BLOCK + 40, torch.float32)
    cut = QUERY_BLOCK + 7
    changed = [part.clone() for part in (k, v)]
    for part in changed:
        part[:, :, cut:] += 1
    before, after = blockwise_attention(q, k, v), blockwise_attention(q, *changed)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


def no_kernel(*_, **__):
    raise AssertionError("compiled bf16 attention took PyTorch's kernel")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile asks, not we
def test_compiled_bf16_attention_equals_softmax_written_out(monkeypatch):
    """Compiled, a CPU's bf16 attention is written out; eager it is a kernel in float32."""
    parts, upstream = attention_problem(25, torch.bfloat16)
    references = value_and_gradients(softmax_written_out, parts, upstream)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", no_kernel)

    @torch.compile(dynamic=False)
    def compiled(q, k, v):
        return causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())

    results = value_and_gradients(compiled, parts, upstream)
    for actual, expected in zip(results, references, strict=True):
        assert float((actual - expected).norm()) <= 0.01 * float(expected.norm()) + 1e-6


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_model_is_as_near_to_float32_as_the_eager_one(monkeypatch):
    """Whole blocks as compiling traces them, without the C++ code, which takes a minute to make."""
    tokens = tokens_of(2, QUERY_BLOCK + 9)

    def loss_and_gradients(low, compiled):
        model = make(CONFIG)
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = torch.nn.functional.cross_entropy(
                model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten()
            )
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, eager = (loss_and_gradients(low, False) for low in (False, True))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", no_kernel)
    compiled = loss_and_gradients(True, True)
    assert abs(compiled[0] - exact[0]) < 1e-3 * exact[0]
    errors = [
        float((result[1] - exact[1]).norm() / exact[1].norm()) for result in (eager, compiled)
    ]
    assert errors[1] < 1.2 * errors[0] < 0.05, errors
