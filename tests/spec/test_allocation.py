"""From a request to integers: tolerances, exact counts, common frames, refusals with a way out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from src.models.transformer import Transformer
from src.spec import allocation, allocation_table
from src.spec.allocation import allocate, count_params
from src.spec.config import ModelConfig, ModelRequest, sweep_from
from tests import ROOT, run_main
from tests.spec import (
    assert_sound,
    built_params,
    integers,
    one,
    request,
    shapes_of,
    shipped,
    way_out,
)

SWEEPS = ("embed_ratio", "glu_expansion")


def glu_group(*expansions: float, **values: object) -> dict[str, ModelRequest]:
    return {f"glu{g:g}": request(glu_expansion=g, **values) for g in expansions}


# ------------------------------------------------------------------------------------ PRD's shapes


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_prd_shape_is_within_the_strict_tolerances(sweep):
    shapes = shapes_of(shipped(sweep))
    assert list(shapes) == list(shipped(sweep).names)
    for shape in shapes.values():
        assert_sound(shape)
        assert shape.total_error <= 0.005
        assert shape.share_error <= 0.0125
        assert shape.glu_error <= 0.05
        assert built_params(shape.model) == shape.params.total


def test_the_prd_sweeps_keep_the_integers_that_are_published():
    shapes = {n: integers(a) for sweep in SWEEPS for n, a in shapes_of(shipped(sweep)).items()}
    assert shapes == {
        "emb25": (160, 24, "5x32", 432),
        "emb35": (224, 11, "7x32", 568),
        "emb45": (280, 6, "8x32", 744),
        "glu2x": (224, 13, "7x32", 440),
        "glu266x": (224, 11, "7x32", 568),
        "glu3x": (224, 10, "7x32", 656),
        "glu4x": (224, 8, "7x32", 896),
    }


def test_the_depth_control_stands_at_the_width_and_depth_of_its_sweep():
    shapes = shapes_of(shipped("depth_control"))
    assert {(shape.model.d_model, shape.model.n_layers) for shape in shapes.values()} == {(224, 9)}
    assert [shape.model.n_heads for shape in shapes.values()] == [16, 12, 11, 5]


def test_the_glu_sweep_changes_depth_and_ffn_alone():
    models = [a.model for a in shapes_of(shipped("glu_expansion")).values()]
    frames = {(m.d_model, m.n_heads, m.head_dim) for m in models}
    assert len(frames) == 1
    assert [m.n_layers for m in models] == sorted((m.n_layers for m in models), reverse=True)
    assert [m.d_ff for m in models] == sorted(m.d_ff for m in models)


def test_experiments_of_another_vocabulary_or_share_may_differ():
    others = {"b": request(embedding_ratio=0.25), "c": request(glu_expansion=2.66)}
    shapes = allocate({"a": request(), **others}, "a")
    assert shapes["a"].model.d_model == shapes["c"].model.d_model
    assert shapes["b"].model.d_model < shapes["a"].model.d_model


# ------------------------------------------------------------------- one experiment beside others


def test_an_experiment_that_is_added_leaves_the_others_as_they_were():
    sweep = shipped("glu_expansion")
    requests = {run.experiment: run.model for run in sweep.runs}
    before = allocate(requests, sweep.baseline)
    for added in (1.5, 5.0, 6.0, 8.0, 12.0):
        with_it = allocate({**requests, "more": request(glu_expansion=added)}, sweep.baseline)
        assert {name: with_it[name] for name in before} == before
        assert not any("without" in note for note in allocation_table.notes(with_it, "glu4x"))


def test_where_the_others_must_move_each_is_named_with_its_shape_before():
    shapes = allocate(glu_group(2.0, 4.0, 23.0), "glu4")
    assert shapes["glu4"].model.d_model != 224  # GLU 23 has no shape there
    notes = [n for n in allocation_table.notes(shapes, "glu4") if "without glu23 it would" in n]
    assert [note.partition(":")[0] for note in notes] == ["glu2", "glu4"]
    assert all("would be d_model 224" in note for note in notes)


def test_an_anchor_without_a_shape_of_its_own_is_no_reason_to_refuse_its_sweep():
    requests = glu_group(
        2.0, 4.0, allocate="attention", total_params=400_000, vocab_size=1_024,
        embedding_ratio=0.25, head_dim=32,
    )  # fmt: skip
    with pytest.raises(ValueError):
        one(requests["glu2"])
    notes = allocation_table.notes(allocate(requests, "glu2"), "glu2")
    assert not any("without" in note for note in notes)


def test_a_group_without_the_baseline_stands_at_its_first_experiments_shape():
    small = {f"small-{n}": r for n, r in glu_group(2.0, 4.0, vocab_size=8_000).items()}
    requests = {**glu_group(2.0, 4.0), **small}
    shapes = allocate(requests, "glu4")
    assert shapes["small-glu2"] == one(requests["small-glu2"])
    assert shapes["glu4"] == one(requests["glu4"])
    with pytest.raises(AssertionError, match="baseline"):
        allocate(glu_group(2.0, 4.0))


@pytest.mark.parametrize(
    ("leader", "d_model", "n_heads", "share"), [("emb45", 280, 8, 0.45), ("emb25", 160, 5, 0.25)]
)
def test_a_glu_sweep_can_inherit_the_leaders_width_and_heads(leader, d_model, n_heads, share):
    leading = shapes_of(shipped("embed_ratio"))[leader]
    raw = yaml.safe_load((ROOT / "configs" / "glu_expansion.yaml").read_text())
    raw["model"] |= {"embedding_ratio": share, "d_model": d_model, "n_heads": n_heads}
    raw["experiments"].append({"name": "same", "glu_expansion": leading.request.glu_expansion})
    shapes = shapes_of(sweep_from(raw, Path("made.yaml")))
    for shape in shapes.values():
        assert (shape.model.d_model, shape.model.n_heads) == (d_model, n_heads)
        assert_sound(shape)
    assert shapes["same"].model == leading.model  # emb25: 24 layers at 8/3
    without_share = {k: v for k, v in raw["model"].items() if k != "embedding_ratio"}
    again = shapes_of(sweep_from({**raw, "model": without_share}, Path("made.yaml")))
    assert {n: a.model for n, a in again.items()} == {n: a.model for n, a in shapes.items()}


def test_expansions_that_few_layers_cannot_tell_apart_are_said():
    requests = glu_group(2.0, 2.66, 3.0, embedding_ratio=0.45, d_model=280, n_heads=8)
    shapes = allocate(requests, "glu2")
    notes = allocation_table.notes(shapes, "glu2")
    assert [n.partition(" are nearly one model")[0] for n in notes if "nearly" in n] == [
        "glu2.66 and glu3"
    ]


def test_heads_and_head_size_are_kept_where_they_are_stated():
    assert one(request(n_heads=9, head_dim=16)).model.head_dim == 16
    narrow = one(request(n_heads=1, head_dim=64))  # an attention width that the user chose
    assert (narrow.model.n_heads, narrow.model.head_dim) == (1, 64)
    assert_sound(narrow)
    with pytest.raises(ValueError, match="n_heads 5") as caught:
        one(request(n_heads=5))  # 160 or 320: neither is within 15 % of any width at this share
    assert way_out(str(caught.value)) == {"x": {"n_heads": None}}


def test_attention_can_absorb_the_budget():
    requests = glu_group(2.0, 2.66, 3.0, 4.0, allocate="attention")
    shapes = allocate(requests, "glu4")
    models = [shape.model for shape in shapes.values()]
    assert len({(m.d_model, m.n_layers, m.head_dim) for m in models}) == 1
    heads = [m.n_heads for m in models]
    assert heads == sorted(heads, reverse=True) and len(set(heads)) == len(heads)
    assert min(heads) >= 4
    by_depth = allocate({n: replace(r, allocate="depth") for n, r in requests.items()}, "glu4")
    assert models[0].n_layers == by_depth["glu4"].model.n_layers
    for shape in shapes.values():
        assert_sound(shape)
        assert built_params(shape.model) == shape.params.total


def test_forced_depth_and_width_are_kept():
    assert one(request(n_layers=12)).model.n_layers == 12
    wide = one(request(d_model=208, embedding_ratio=None))
    assert wide.model.d_model == 208 and wide.share_error == 0.0
    assert_sound(wide)
    with pytest.raises(ValueError, match="found n_layers 40") as caught:
        one(request(n_layers=40))
    assert way_out(str(caught.value)) == {"x": {"n_layers": None}}


def test_a_factorised_table_counts_table_and_projection_as_embedding():
    shape = one(request(embedding_dim=128, embedding_ratio=None))
    model, params = shape.model, shape.params
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
    counts = dict.fromkeys(("embedding", "projection", "attention", "ffn", "norm"), 0)
    for name, parameter in model.named_parameters():
        block = (
            "norm" if "norm" in name
            else "projection" if name.endswith("projection")
            else "embedding" if name.endswith("table")
            else "attention" if ".attention." in name
            else "ffn"
        )  # fmt: skip
        counts[block] += parameter.numel()
    assert counts == {name: getattr(params, name) for name in counts}
    assert sum(counts.values()) == params.total


def test_flops_count_each_multiplied_weight_and_the_attention():
    config = ModelConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=64)
    weights = 100 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    # QK^T and AV are 2 * 2 * a a pair; a token sees (T + 1) / 2, about T / 2; three passes.
    attention = 2 * 3 * 2 * 2 * 32 * 64 // 2
    assert allocation.flops_per_token(config, 64) == 6 * weights + attention
    untied = replace(config, tie_embeddings=False)  # a lookup multiplies nothing
    assert allocation.flops_per_token(untied, 64) == allocation.flops_per_token(config, 64)


# --------------------------------------------------------------------------------------- refusals


def test_experiments_without_a_common_frame_are_refused_with_a_way_out():
    requests = {"wide": request(glu_expansion=23.0, n_layers=2), "usual": request(n_layers=2)}
    with pytest.raises(ValueError) as caught:
        allocate(requests, "usual")
    changes = way_out(str(caught.value))
    assert changes.keys() == requests.keys()
    assert allocate({name: replace(r, **changes[name]) for name, r in requests.items()}, "usual")


def test_a_refusal_says_what_was_asked_and_what_came_nearest():
    with pytest.raises(ValueError) as caught:
        allocate({"tiny": request(total_params=200_000, vocab_size=100_000)})
    message = str(caught.value)
    assert message.startswith("experiments tiny: found total_params 200,000, vocab_size 100,000 (")
    with pytest.raises(ValueError, match=r"Nearest: d_model n_layers heads d_ff.*\n +\d+ +\d+"):
        one(request(glu_expansion=30.0))


def test_a_share_that_several_vocabularies_cannot_have_is_refused_once_with_yaml_for_all():
    raw = {
        "model": {"total_params": 3_000_000},
        "experiments": [{"name": f"v{size}", "vocab_size": size} for size in (1_024, 2_048, 8_192)],
    }
    with pytest.raises(ValueError) as caught:
        shapes_of(sweep_from(raw, Path("mine.yaml")))
    changes = way_out(str(caught.value))
    assert changes.keys() == {"v1024", "v2048"}
    assert all(keys.keys() == {"d_model", "embedding_ratio"} for keys in changes.values())
    parts = str(caught.value).split(" (by default ")
    assert "0.35" not in parts[0] and "embedding_ratio 0.35" in parts[1]  # nobody wrote it
    entries = [{**entry, **changes.get(entry["name"], {})} for entry in raw["experiments"]]
    for name, shape in shapes_of(sweep_from({**raw, "experiments": entries}, Path("x"))).items():
        assert 2 <= shape.model.n_layers <= 64
        assert shape.model.d_model == changes.get(name, {}).get("d_model", shape.model.d_model)


def test_absurd_shapes_are_refused_or_said():
    with pytest.raises(ValueError, match="at most 128 layers"):
        one(request(embedding_ratio=0.05))  # 749 layers of width 32
    deep = {"deep": one(request(embedding_ratio=0.18))}
    assert deep["deep"].model.n_layers <= 64 and not allocation_table.notes(deep, "deep")
    deeper = {"deep": one(request(embedding_ratio=0.15))}
    assert deeper["deep"].model.n_layers > 64
    (note,) = allocation_table.notes(deeper, "deep")
    assert note.startswith(f"deep: {deeper['deep'].model.n_layers} layers")
    quick = shapes_of(shipped("quickstart_embed"))
    assert {a.model.head_dim for a in quick.values()} == {16}  # one of them had one head of 64
    mixed = {"a": one(request()), "b": one(request(n_heads=14, head_dim=16))}
    assert "heads of 16 and 32" in allocation_table.notes(mixed, "a")[-1]


# ------------------------------------------------------------------------------------ the dry run


def test_the_dry_run_prints_the_sweep_by_block_without_torch():
    code = (
        "import sys, run_experiment\n"
        "code = run_experiment.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.exit(code)"
    )
    line = ("--dry_run", "--config", "configs/embed_ratio.yaml")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *line],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table, _, cost = done.stdout.partition("\n\n")
    assert cost.startswith("runs: 3, tokens: 150,011,904, training FLOPs: ")
    assert "under 1 USD" in cost
    header, *rows = table.splitlines()
    for column in ("share", "GLU", "embedding", "projection", "attention", "ffn", "norm", "total"):
        assert column in header
    assert [row.split()[0] for row in rows] == ["emb35", "emb25", "emb45"]
    assert "3,584,000" in rows[0]


@pytest.fixture
def dry_run(capsys) -> Callable[..., str]:
    def call(*arguments: object) -> str:
        assert run_main("--dry_run", "--config", *arguments) == 0
        return capsys.readouterr().out

    return call


def test_the_dry_run_ends_its_table_with_what_to_know_of_it(dry_run, tmp_path):
    text = (ROOT / "configs" / "glu_expansion.yaml").read_text()
    more = text.replace("training:", "  - name: glu8x\n    glu_expansion: 8.0\ntraining:")
    (tmp_path / "more.yaml").write_text(more)
    printed = dry_run(tmp_path / "more.yaml")
    assert "\nnote: glu8x: built with a GLU expansion of 7.250" in printed
    assert "note" not in dry_run(ROOT / "configs" / "glu_expansion.yaml")


def test_the_dry_run_for_machines_has_exactly_the_documented_keys(dry_run):
    printed = dry_run(ROOT / "configs" / "glu_expansion.yaml", "--json")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["name"] for row in rows] == ["glu2x", "glu266x", "glu3x", "glu4x"]
    quantities = {"total_params", "embedding_ratio", "glu_expansion"}
    for row in rows:
        assert set(row) == {"name", "asked", "built", "model", "params"}
        assert set(row["asked"]) == {f"{key}_asked" for key in quantities}
        assert set(row["built"]) == {f"{key}_built" for key in quantities}
        assert set(row["model"]) == {
            "vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "d_ff", "embedding_dim",
            "tie_embeddings", "qk_norm",
        }  # fmt: skip
        assert set(row["params"]) == {"embedding", "projection", "attention", "ffn", "norm"}
        assert sum(row["params"].values()) == row["built"]["total_params_built"]
        assert row["model"]["d_ff"] / row["model"]["d_model"] == row["built"]["glu_expansion_built"]
        built = built_params(ModelConfig(**row["model"]))
        assert built == row["built"]["total_params_built"]
    assert [row["asked"]["glu_expansion_asked"] for row in rows] == [2.0, 2.66, 3.0, 4.0]
