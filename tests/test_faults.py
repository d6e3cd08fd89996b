"""A sample of the fault plan (tests/faults): every family, and two mutants.

The whole plan is `make faults`; its table as last run is in results/faults/. The sample runs as a
program of its own, because its runs are forks of a process that has computed nothing.
"""

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.faults.bench import Tally, state_differences
from tests.faults.mutants import MUTANTS, mutated

FAMILIES = ("F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9", "teeth")


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> dict[str, list[Tally]]:
    """The lines of the sample's table, by family."""
    place = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults", "--quick", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--json", str(place / "lines.json"), "--work", str(place / "work")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (place / "lines.json").exists(), done.stderr
    lines = [Tally(**line) for line in json.loads((place / "lines.json").read_text())]
    assert (done.returncode == 0) == all(line.passed for line in lines), done.stdout
    return {name: [line for line in lines if line.fault == name] for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_injected_fault_is_survived_or_detected(sample, family):
    lines = sample[family]
    assert lines and all(line.injected for line in lines)
    assert [problem for line in lines for problem in line.problems] == []
    assert all(line.good == line.injected for line in lines)


def test_every_mutant_of_the_whole_plan_fits_the_code():
    for mutant in MUTANTS:
        assert mutated(mutant)


def test_the_judge_sees_a_single_bit():
    import torch

    def state() -> dict:
        weights = torch.arange(6.0).reshape(2, 3)
        return {"model": {"w": weights, "b": torch.zeros(()).bfloat16()}, "rng": (1, [2.0, None])}

    assert state_differences(state(), state()) == []
    for change in ("w", "b", "rng", "zero"):
        other = state()
        if change == "w":
            other["model"]["w"].view(torch.int32)[1, 2] ^= 1
        elif change == "b":
            other["model"]["b"] = other["model"]["b"].float()
        elif change == "zero":
            other["model"]["b"] = -other["model"]["b"]
        else:
            other["rng"] = (1, [2.0, 0])
        assert len(state_differences(other, state())) == 1, change
