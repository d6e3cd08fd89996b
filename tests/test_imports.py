"""The direction of imports: a room imports only the rooms above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

# From top to bottom; a room may know the rooms above it and itself, never one below.
ROOMS = (
    "spec", "storage", "data", "models", "compute", "evaluation", "", "analysis", "study",
)  # fmt: skip
# Decided without a file, a clock or a GPU, so without anything of ours that has one.
PURE = {
    "analysis.decisions", "analysis.intervals", "analysis.kill_replay", "analysis.rankings",
    "analysis.repeats", "analysis.science.published_laws", "spec.kill_rule", "spec.rates",
}  # fmt: skip
# Everything before the lock: these may not cost torch's import.
WITHOUT_TORCH = (
    "spec.config", "spec.allocation", "spec.allocation_table", "spec.costs", "spec.kill_rule",
    "spec.command_line",
    "storage.run_dir", "data.tokens", "data.tasks", "data.leakage", "evaluation.metrics",
    "compute.process_group", "preflight", "run", "study.sanity", "study.runner",
    "study.speed", "compute.cores", "storage.choices", "spec.progress",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted names below `src` and their files."""
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        if path.name != "__init__.py":
            parts = path.relative_to(ROOT / "src").with_suffix("").parts
            found[".".join(parts)] = path
    return found


MODULES = modules()


@cache
def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, functions included; relative ones as '.'."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." if node.level else str(node.module)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The modules of `src` that a file imports."""
    names = {name.removeprefix("src.") for name in imported(path) if name.startswith("src.")}
    return names & set(MODULES)


def room(module: str) -> str:
    """The first folder below `src`; "" for the files on top."""
    return module.split(".")[0] if "." in module else ""


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_the_rooms_above_it(module):
    own = ROOMS.index(room(module))
    for other in ours(MODULES[module]):
        assert ROOMS.index(room(other)) <= own, f"src/{module} imports src/{other}, a room below"


@pytest.mark.parametrize("folder", sorted({room(module) for module in MODULES} - {""}))
def test_a_room_states_its_charter(folder):
    charter = ast.get_docstring(ast.parse((ROOT / "src" / folder / "__init__.py").read_text()))
    assert charter and charter.endswith(".")


def test_no_modules_import_each_other():
    graph = {module: ours(path) for module, path in MODULES.items()}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"a circle of imports among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


@pytest.mark.parametrize("module", sorted(PURE))
def test_what_decides_imports_no_torch_and_of_ours_only_what_decides(module):
    names = imported(MODULES[module])
    assert not {name for name in names if name.split(".")[0] in ("torch", "time", ".")}
    assert ours(MODULES[module]) <= PURE | {
        "spec.config",
        "spec.strict_yaml",
        "spec.training_config",
    }


def test_no_catch_all_modules_and_path_edits_in_doors_only():
    for path in (ROOT / "src").rglob("*.py"):
        assert path.stem not in ("utils", "util", "common", "helpers", "misc"), path
        assert "sys.path." not in path.read_text(encoding="utf-8"), path
    assert (ROOT / "src" / "__init__.py").read_text() == ""


@pytest.mark.parametrize("door", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_a_door_is_a_screen_of_imports_and_one_call(door):
    kinds = [type(node) for node in ast.parse(door.read_text(encoding="utf-8")).body]
    assert set(kinds) <= {ast.Expr, ast.Import, ast.ImportFrom, ast.If}, door


def test_before_the_lock_no_torch_and_in_training_neither_datasets_nor_transformers():
    code = "import sys, run_experiment\n"
    code += "".join(f"import src.{module}\n" for module in WITHOUT_TORCH)
    code += "heavy = {'transformers', 'datasets', 'pandas', 'matplotlib'}\n"
    code += "assert not (heavy | {'torch'}) & set(sys.modules), sorted(sys.modules)\n"
    code += "from src import train, evaluation\n"
    code += "assert not heavy & set(sys.modules), sorted(sys.modules)"
    line = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
