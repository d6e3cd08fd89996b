"""Sweeps that a study makes for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.spec import config
from src.spec.strict_yaml import read_yaml
from src.study.generated import on_model_of
from src.study.plan import Configuration, allocate
from tests import ROOT


def test_a_leader_whose_heads_absorb_the_budget_keeps_its_width_alone() -> None:
    sizes = {"total_params": 10_485_760, "vocab_size": 16_384}
    entry: dict[str, Any] = {"name": "share35", "embedding_ratio": 0.35, "allocate": "attention"}
    raw = {"model": sizes, "experiments": [entry]}
    sweep = config.sweep_from(raw, Path("shares.yaml"))
    (shape,) = allocate(sweep).values()
    glu = read_yaml(ROOT / "configs/glu_expansion.yaml", "an experiment file") | {"model": sizes}
    made = on_model_of(glu, entry, Configuration(sweep.file, sweep.runs[0], shape))
    built = [one.model for one in allocate(config.sweep_from(made, Path("glu.yaml"))).values()]
    assert {(one.d_model, one.n_layers) for one in built} == {(shape.model.d_model, 9)}
    assert len({one.n_heads for one in built}) == 4
