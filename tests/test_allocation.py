"""From a request to integers: tolerances, exact counts, common frames, refusals with a way out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.models.transformer import Transformer
from src.spec import allocation
from src.spec.allocation import WIDE, WIDEST, Allocation, allocate, count_params
from src.spec.config import ModelConfig, ModelRequest, load_sweep

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = ("embed_ratio", "glu_expansion")


def request(**values: object) -> ModelRequest:
    return ModelRequest(**{"embedding_ratio": 0.35, **values})  # type: ignore[arg-type]


def one(asked: ModelRequest) -> Allocation:
    return allocate({"x": asked})["x"]


def built_params(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Transformer(config)
    return sum(parameter.numel() for parameter in model.parameters())


def assert_sound(answer: Allocation) -> None:
    """What holds for every answer, whatever was asked."""
    asked, model = answer.request, answer.model
    assert abs(answer.params.total / asked.total_params - 1) <= WIDE.total
    if asked.embedding_ratio is not None:
        assert abs(answer.params.share - asked.embedding_ratio) <= WIDE.share
    assert abs(model.d_ff / model.d_model / asked.glu_expansion - 1) <= WIDE.glu
    assert model.d_model % 8 == 0 and model.d_ff % 8 == 0 and model.n_layers >= 1
    assert model.head_dim in ((16, 32, 64) if asked.total_params < 3_000_000 else (32, 64))
    width = model.n_heads * model.head_dim
    if asked.allocate == "attention":
        assert model.n_heads >= 4
    else:
        assert abs(width / model.d_model - 1) <= WIDEST.attention + 1e-9
    assert (model.vocab_size, model.embedding_dim) == (asked.vocab_size, asked.embedding_dim)
    assert (model.tie_embeddings, model.qk_norm) == (asked.tie_embeddings, asked.qk_norm)
    assert answer.params == count_params(model)


# ------------------------------------------------------------------------------------ PRD's cells


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_prd_cell_is_within_the_strict_tolerances(sweep):
    cells = load_sweep(ROOT / "configs" / f"{sweep}.yaml").runs
    answers = allocate({run.experiment: run.model for run in cells})
    assert list(answers) == [run.experiment for run in cells]
    for answer in answers.values():
        assert_sound(answer)
        assert answer.total_error <= 0.005
        assert answer.share_error <= 0.0125
        assert answer.glu_error <= 0.05
        assert built_params(answer.model) == answer.params.total


def test_the_glu_sweep_changes_depth_and_ffn_alone():
    cells = load_sweep(ROOT / "configs" / "glu_expansion.yaml").runs
    models = [a.model for a in allocate({run.experiment: run.model for run in cells}).values()]
    frames = {(m.d_model, m.n_heads, m.head_dim) for m in models}
    assert len(frames) == 1
    assert [m.n_layers for m in models] == sorted((m.n_layers for m in models), reverse=True)
    assert [m.d_ff for m in models] == sorted(m.d_ff for m in models)


def test_cells_of_another_vocabulary_or_share_may_differ():
    answers = allocate(
        {"a": request(), "b": request(embedding_ratio=0.25), "c": request(glu_expansion=2.66)}
    )
    assert answers["a"].model.d_model == answers["c"].model.d_model
    assert answers["b"].model.d_model < answers["a"].model.d_model


def test_attention_can_absorb_the_budget():
    asked = {f"g{g}": request(glu_expansion=g, allocate="attention") for g in (2.0, 2.66, 3.0, 4.0)}
    answers = allocate(asked)
    models = [answer.model for answer in answers.values()]
    assert len({(m.d_model, m.n_layers, m.head_dim) for m in models}) == 1
    heads = [m.n_heads for m in models]
    assert heads == sorted(heads, reverse=True) and len(set(heads)) == len(heads)
    assert min(heads) >= 4
    by_depth = allocate({name: replace(r, allocate="depth") for name, r in asked.items()})
    assert models[0].n_layers == by_depth["g4.0"].model.n_layers
    for answer in answers.values():
        assert_sound(answer)
        assert built_params(answer.model) == answer.params.total


def test_forced_depth_and_width_are_kept():
    assert one(request(n_layers=12)).model.n_layers == 12
    wide = one(request(d_model=208, embedding_ratio=None))
    assert wide.model.d_model == 208 and wide.share_error == 0.0
    assert_sound(wide)
    with pytest.raises(ValueError, match="feasible without the forced n_layers"):
        one(request(n_layers=40))


def test_a_factorised_table_counts_table_and_projection_as_embedding():
    answer = one(request(embedding_dim=128, embedding_ratio=None))
    model, params = answer.model, answer.params
    assert params.embedding == 16_000 * 128 and params.projection == 128 * model.d_model
    assert params.share == (params.embedding + params.projection) / params.total
    assert built_params(model) == params.total
    untied = replace(model, tie_embeddings=False)
    assert count_params(untied).embedding == 2 * params.embedding
    assert count_params(untied).projection == 2 * params.projection
    # The share does not fix the width here: depth follows it as published shapes do.
    assert 128 < model.d_model < 512 and 4 <= model.n_layers <= 24


# ------------------------------------------------------------------------------------ exact counts


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [None, 24])
def test_the_closed_form_is_the_built_models_count(qk_norm, tied, rank):
    config = ModelConfig(
        vocab_size=263, d_model=48, n_layers=3, n_heads=5, head_dim=16, d_ff=104,
        embedding_dim=rank, tie_embeddings=tied, qk_norm=qk_norm,
    )  # fmt: skip
    model = Transformer(config)
    params = count_params(config)
    found = dict.fromkeys(("embedding", "projection", "attention", "ffn", "norm"), 0)
    for name, parameter in model.named_parameters():
        block = (
            "norm" if "norm" in name
            else "projection" if name.endswith("projection")
            else "embedding" if name.endswith("table")
            else "attention" if ".attention." in name
            else "ffn"
        )  # fmt: skip
        found[block] += parameter.numel()
    assert found == {name: getattr(params, name) for name in found}
    assert sum(found.values()) == params.total


def test_flops_count_each_multiplied_weight_and_the_attention():
    config = ModelConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=64)
    weights = 100 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    # QK^T and AV are 2 * 2 * a a pair; a token sees (T + 1) / 2, about T / 2; three passes.
    attention = 2 * 3 * 2 * 2 * 32 * 64 // 2
    assert allocation.flops_per_token(config, 64) == 6 * weights + attention
    untied = replace(config, tie_embeddings=False)  # a lookup multiplies nothing
    assert allocation.flops_per_token(untied, 64) == allocation.flops_per_token(config, 64)


# -------------------------------------------------------------------------------------- properties

REQUESTS = st.builds(
    ModelRequest,
    total_params=st.floats(5.31, 8.3).map(lambda exponent: int(10**exponent)),
    vocab_size=st.floats(2.41, 5.1).map(lambda exponent: int(10**exponent)),
    embedding_ratio=st.floats(0.02, 0.8),
    glu_expansion=st.one_of(st.sampled_from([2.0, 2.66, 8 / 3, 3.0, 4.0]), st.floats(1.0, 6.0)),
    tie_embeddings=st.booleans(),
    qk_norm=st.booleans(),
    allocate=st.sampled_from(["depth", "attention"]),
)


def feasible_request(asked: ModelRequest, message: str) -> ModelRequest:
    """The request that a refusal names as the nearest feasible one."""
    free = asked
    if "without the forced" in message:
        free = replace(asked, n_layers=None, d_model=None, embedding_dim=None)
        free = replace(free, embedding_ratio=asked.embedding_ratio or 0.35)
    share = re.search(r"nearest feasible request is embedding_ratio (0\.\d+)", message)
    total = re.search(r"nearest feasible request found is total_params ([\d,]+)", message)
    if share:
        return replace(free, embedding_ratio=float(share[1]))
    if total:
        return replace(free, total_params=int(total[1].replace(",", "")))
    assert "it is feasible without the forced" in message
    return free


def check_answer_or_way_out(asked: ModelRequest) -> None:
    try:
        answer = one(asked)
    except ValueError as error:
        message = str(error)
        assert f"total_params {asked.total_params:,}" in message and "Tried:" in message
        assert_sound(one(feasible_request(asked, message)))
    else:
        assert_sound(answer)
        assert built_params(answer.model) == answer.params.total or answer.model.n_layers > 60


@settings(max_examples=30)
@given(asked=REQUESTS)
def test_an_answer_is_within_tolerance_and_a_refusal_names_a_way_out(asked):
    check_answer_or_way_out(asked)


@settings(max_examples=15)
@given(
    asked=REQUESTS,
    force=st.sampled_from(["n_layers", "d_model", "embedding_dim"]),
    size=st.integers(1, 40),
)
def test_the_same_holds_for_forced_shapes(asked, force, size):
    value = size if force == "n_layers" else 8 * size
    check_answer_or_way_out(replace(asked, **{force: value}))


@settings(max_examples=8)
@given(asked=REQUESTS, factors=st.sets(st.sampled_from([1.5, 2.0, 2.66, 3.0, 4.0]), min_size=2))
def test_cells_of_one_sweep_share_their_frame_or_are_refused(asked, factors):
    cells = {f"g{f}": replace(asked, glu_expansion=f) for f in factors}
    try:
        answers = allocate(cells)
    except ValueError as error:
        assert "experiments g" in str(error) and "feasible" in str(error)
        return
    assert len({(a.model.d_model, a.model.head_dim) for a in answers.values()}) == 1
    fixed = "n_heads" if asked.allocate == "depth" else "n_layers"
    assert len({getattr(a.model, fixed) for a in answers.values()}) == 1
    for answer in answers.values():
        assert_sound(answer)


def test_cells_without_a_common_frame_are_refused_with_a_way_out():
    cells = {"wide": request(glu_expansion=23.0, n_layers=2), "usual": request(n_layers=2)}
    with pytest.raises(ValueError) as caught:
        allocate(cells)
    assert "experiments " in str(caught.value) and "feasible" in str(caught.value)


def test_a_refusal_says_what_was_tried():
    with pytest.raises(ValueError) as caught:
        allocate({"tiny": request(total_params=200_000, vocab_size=100_000)})
    message = str(caught.value)
    assert message.startswith("experiments tiny: found total_params 200,000")
    assert "vocab_size 100,000" in message and "embedding_ratio 0.35" in message
    with pytest.raises(ValueError, match=r"Tried: d_model n_layers heads d_ff.*\n +\d+ +\d+"):
        one(request(glu_expansion=30.0))


# ------------------------------------------------------------------------------------ the dry run


def dry_run(*arguments: str) -> str:
    """Runs the entry point; asserts that torch was not imported."""
    code = (
        "import sys, run_experiment\n"
        "code = run_experiment.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "--dry_run", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_dry_run_prints_the_sweep_by_block_without_torch():
    printed = dry_run("--config", "configs/embed_ratio.yaml")
    table, _, floor = printed.partition("\n\n")
    assert floor.startswith("runs: 3, tokens: 150,011,904, training FLOPs: ")
    assert "under 1 USD" in floor
    header, *rows = table.splitlines()
    for column in ("share", "GLU", "embedding", "projection", "attention", "ffn", "norm", "total"):
        assert column in header
    assert [row.split()[0] for row in rows] == ["emb35", "emb25", "emb45"]
    assert "3,584,000" in rows[0]


def test_the_dry_run_for_machines_has_exactly_the_documented_keys():
    printed = dry_run("--config", "configs/glu_expansion.yaml", "--json")
    cells = [json.loads(line) for line in printed.splitlines()]
    assert [cell["name"] for cell in cells] == ["glu2x", "glu266x", "glu3x", "glu4x"]
    ask = {"total_params", "embedding_ratio", "glu_expansion"}
    for cell in cells:
        assert set(cell) == {"name", "asked", "realised", "model", "params"}
        assert set(cell["asked"]) == set(cell["realised"]) == ask
        assert set(cell["model"]) == {
            "vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "d_ff", "embedding_dim",
            "tie_embeddings", "qk_norm",
        }  # fmt: skip
        assert set(cell["params"]) == {"embedding", "projection", "attention", "ffn", "norm"}
        assert sum(cell["params"].values()) == cell["realised"]["total_params"]
        assert cell["model"]["d_ff"] / cell["model"]["d_model"] == cell["realised"]["glu_expansion"]
        built = built_params(ModelConfig(**cell["model"]))
        assert built == cell["realised"]["total_params"]
    assert [cell["asked"]["glu_expansion"] for cell in cells] == [2.0, 2.66, 3.0, 4.0]
