"""The direction of imports: a module imports only what stands above it, scripts nothing of src."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From top to bottom; modules of one row may know each other.
ROWS = (
    {"rates", "published_laws", "strict_yaml"},
    {"config", "command_line"},
    {"allocation", "costs"},
    {"predictions"},
    {"run_dir", "data", "smallbench", "leakage"},
    {"models.transformer", "models.loss", "models.export"},
    {"checkpoint", "runtime", "remote", "record", "distributed"},
    {"perplexity", "kill_rule", "trained_run"},
    {"preflight"},
    {"probe"},
    {"machine"},
    {"train"},
    {"eval_smallbench", "eval_latency", "instruction_tuning", "sanity_training"},
    {"sanity"},
    {"evaluation", "assistant"},
    {"execution"},
    {"decisions", "fits"},
    {"compare"},
    {"science"},
    {"planning.cells"},
    {"planning.ledger", "planning.costs"},
    {"planning.ranking", "planning.vocabulary"},
    {"planning.finals"},
    {"study_plan"},
    {"with_parent", "study_jobs"},
    {"study_record"},
    {"study"},
    {"launch.runs"},
    {"launch.local", "launch.slurm", "launch.sky"},
    {"launch.__main__"},
)
ROW = {module: row for row, modules in enumerate(ROWS) for module in modules}
# Decided without a file, a clock or a GPU, so without anything of ours that has one.
PURE = {"decisions", "kill_rule", "published_laws", "rates"}
# Everything before the lock: these may not cost torch's import.
WITHOUT_TORCH = (
    "config", "allocation", "costs", "run_dir", "data", "smallbench", "leakage", "record",
    "kill_rule", "command_line", "preflight", "execution", "sanity", "study",
    "distributed",
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


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rows_above_it(module):
    assert module in ROW, f"give src/{module} a row in {__file__}"
    for other in ours(MODULES[module]):
        assert ROW[other] <= ROW[module], f"src/{module} imports src/{other}, which is below it"


def test_no_modules_import_each_other():
    graph = {module: ours(path) for module, path in MODULES.items()}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"a circle of imports among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


@pytest.mark.parametrize("module", sorted(PURE))
def test_what_decides_imports_nothing_of_ours_and_no_torch(module):
    names = imported(MODULES[module])
    assert not {name for name in names if name.split(".")[0] in ("src", "torch", "time", ".")}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_do_not_import_src(path):
    assert not {name for name in imported(path) if name.split(".")[0] in ("src", ".")}


@pytest.mark.parametrize("folder", ["src", "scripts"])
def test_no_catch_all_modules_and_no_path_edits(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert path.stem not in ("utils", "util", "common", "helpers", "misc"), path
        edits = ("sys.path.append", "sys.path.insert")
        assert not any(edit in path.read_text(encoding="utf-8") for edit in edits), path
    assert (ROOT / "src" / "__init__.py").read_text() == ""


def test_what_comes_before_the_lock_imports_neither_torch_nor_transformers():
    code = f"import sys, run_experiment\nfrom src import {', '.join(WITHOUT_TORCH)}\n"
    code += "heavy = {'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_training_imports_neither_datasets_nor_transformers():
    code = "import sys\nfrom src import train, evaluation\n"
    code += "heavy = {'transformers', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
