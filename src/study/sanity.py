"""Phase 0: does the wiring learn, at which rate, and where do the parameters lie?

    python run_experiment.py --config configs/embed_ratio.yaml --exp emb35 --phase sanity

Writes <log_dir>/<exp>-sanity/{learning_rates.json, learning_rates.png} and, last, sanity.json. Cut
in the ramp, it goes on there. torch is imported once the directory is locked.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from src.preflight import RunContext
from src.spec import config, costs
from src.spec.command_line import OK, OUR_FAULT
from src.spec.metric_keys import EMBEDDING_RATIO, TOTAL_PARAMS
from src.storage.files import read_json, write_json
from src.storage.run_dir import locked


def check_all(contexts: Sequence[RunContext]) -> int:
    """The checks of every experiment, printed; the exit code. Raises as `check` does."""
    passed = True
    for context in contexts:
        result = check(context)
        print(report(result), flush=True)
        passed &= result["passed"]
    return OK if passed else OUR_FAULT


def check(context: RunContext) -> dict[str, Any]:
    """All checks of one experiment; returns (and writes) sanity.json's content.

    A finished check is read back, not repeated. Raises Held where another process is at it,
    Preempted after a signal, ValueError for finished checks of another configuration.
    """
    training, model = context.run.training, context.allocation.model
    directory = context.log_dir / f"{context.run.experiment}-sanity"
    directory.mkdir(parents=True, exist_ok=True)
    done = directory / "sanity.json"
    digest = config.digest({"model": config.to_dict(model), "training": config.to_dict(training)})
    with locked(directory):
        if done.is_file():
            result = read_json(done)
            if result.get("config_digest", digest) != digest:
                raise ValueError(
                    f"{done}: found the checks of another model or training configuration, "
                    f"expected those of this one; use another log_dir, or delete {directory}"
                )
            return result
        from src.compute import compute_config
        from src.study import sanity_training

        compute = compute_config.choose(
            training, model, context.log_dir, context.device, directory.name
        )
        result = {"experiment": context.run.experiment, "config_digest": digest}
        result |= sanity_training.measure(context, compute, directory, digest)
        price = costs.price_per_hour(result["device"], result["device_name"])
        result["cost_usd"] = None if price is None else result["wall_seconds"] / 3600 * price
        write_json(done, result)
        shutil.rmtree(directory / "ramp", ignore_errors=True)
        return result


def losses_text(result: Mapping[str, Any]) -> list[str]:
    """The losses of an untrained model and of a memorised batch, for people."""
    memorised = result["overfit_loss"]
    last = "not a number" if memorised is None else f"{memorised:.3f}"
    return [
        f"initial loss {result['initial_loss']:.3f} (ln V {result['ln_vocab']:.3f})",
        f"{result['overfit_tokens']} tokens to loss {last} in {result['overfit_steps']} steps",
    ]


def rates_text(result: Mapping[str, Any]) -> list[str]:
    """The suggested learning rate and the configured one, for people."""
    rate = result["suggested_learning_rate"]
    suggested = "none" if rate is None else f"{rate:.2g}"
    return [f"suggested {suggested}", f"configured {result['learning_rate']:g}"]


def report(result: Mapping[str, Any]) -> str:
    """The findings for people, parameters by block among them."""
    total, share = result[TOTAL_PARAMS.built], result[EMBEDDING_RATIO.built]
    return "\n".join(
        [
            *(f"{result['experiment']}: {'ok  ' if passed else 'FAIL'} {name}"
              for name, passed in result["checks"].items()),
            *(f"  {block:<11} {count:>12,} {count / total:>8.2%}"
              for block, count in result["params"].items()),
            f"  {'total':<11} {total:>12,}, {EMBEDDING_RATIO.built} {share:.4f}",
            f"  loss: {'; '.join(losses_text(result))}",
            f"  learning rate: {', '.join(rates_text(result))}; "
            f"rule: {result['learning_rate_rule']}",
        ]
    )  # fmt: skip
