"""Phase 0: does the wiring learn, at which rate, and where do the parameters lie?

    python run_experiment.py --config configs/embed_ratio.yaml --exp emb35 --phase sanity

Writes <log_dir>/<exp>-sanity/{wiring.json, learning_rates.json, learning_rates.png} and, last,
sanity.json; interrupted anywhere, it goes on. torch is imported once the directory is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.data.tokens import TokenData
from src.preflight import RunContext
from src.run import Preempted
from src.spec import config, costs
from src.spec.allocation import Allocation
from src.spec.command_line import OK, OUR_FAULT
from src.spec.config import RunConfig
from src.spec.metric_keys import EMBEDDING_RATIO, TOTAL_PARAMS
from src.storage.files import read_json
from src.storage.run_dir import Preemption, locked, write_json


def check_all(contexts: Sequence[RunContext]) -> int:
    """The checks of every experiment, printed; the exit code. Raises as `check` does, and
    Preempted."""
    passed = True
    for one in contexts:
        found = check(one.run, one.allocation, one.data, one.log_dir, one.device)
        if found is None:
            raise Preempted(f"a signal during the checks of {one.run.experiment}")
        print(report(found), flush=True)
        passed &= found["passed"]
    return OK if passed else OUR_FAULT


def check(
    run: RunConfig, answer: Allocation, data: TokenData, log_dir: Path, device: str
) -> dict[str, Any] | None:
    """All checks of one experiment; returns (and writes) sanity.json's content.

    None after a signal: run me again. A finished check is read back, not repeated. Raises Held
    where another process is at it, ValueError for finished checks of another configuration.
    """
    directory = log_dir / f"{run.experiment}-sanity"
    directory.mkdir(parents=True, exist_ok=True)
    content = {"model": config.to_dict(answer.model), "training": config.to_dict(run.training)}
    digests = {
        "config": config.digest(content),
        "tokenizer": data.tokenizer_sha256,
        "data": data.sha256,
    }
    with locked(directory), Preemption() as stop:
        done = directory / "sanity.json"
        if done.is_file():
            return _same(read_json(done), digests["config"], done)
        from src.compute import compute_config as machine
        from src.study import sanity_training

        chosen = machine.choose(run.training, answer.model, log_dir, device, directory.name)
        try:
            found = sanity_training.Measuring(
                run, answer, data, chosen, directory, digests, stop
            ).result()
        except sanity_training.Interrupted:
            return None
        price = costs.price_per_hour(chosen.device.type, found["device_name"])
        found["cost_usd"] = None if price is None else found["wall_seconds"] / 3600 * price
        write_json(done, found)
        return found


def _same(found: dict[str, Any], digest: str, path: Path) -> dict[str, Any]:
    """Finished checks, if they are of this configuration."""
    if found.get("config_digest", digest) != digest:
        raise ValueError(
            f"{path}: found the checks of another model or training configuration, expected those "
            f"of this one; use another log_dir, or delete {path.parent}"
        )
    return found


def report(found: dict[str, Any]) -> str:
    """The findings for people, parameters by block among them."""
    total = found[TOTAL_PARAMS.built]
    lines = [
        f"{found['experiment']}: {'ok  ' if fine else 'FAIL'} {name}"
        for name, fine in found["checks"].items()
    ]
    lines += [
        f"  {block:<11} {count:>12,} {count / total:>8.2%}"
        for block, count in found["params"].items()
    ]
    share = found[EMBEDDING_RATIO.built]
    lines.append(f"  {'total':<11} {total:>12,}, {EMBEDDING_RATIO.built} {share:.4f}")
    overfit_loss = found["overfit_loss"]
    last = "not a number" if overfit_loss is None else f"{overfit_loss:.3f}"
    lines.append(
        f"  loss: {found['initial_loss']:.3f} at first (ln V {found['ln_vocab']:.3f}), {last} "
        f"after {found['overfit_steps']} steps on {found['overfit_tokens']:,} tokens"
    )
    rate = found["suggested_learning_rate"]
    lines.append(
        f"  learning rate: suggested {'none' if rate is None else f'{rate:.2g}'}, configured "
        f"{found['learning_rate']:g}; rule: {found['learning_rate_rule']}"
    )
    return "\n".join(lines)
