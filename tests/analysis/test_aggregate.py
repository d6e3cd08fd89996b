"""The aggregator on synthetic run directories: every run a row, every refusal a sentence."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from src.analysis import run_csv, run_table, sweep_figures
from src.analysis.blocks import blocks
from src.spec import metric_keys
from tests import ROOT, python
from tests.synthetic_runs import GLU_SWEEP, SHARE_SWEEP, Experiment, write_run, write_sweep

SHARE_FILE, GLU_FILE = "configs/embed_ratio.yaml", "configs/glu_expansion.yaml"
NAMES = ["emb35", "emb25", "emb45"]
SWEEP = {"file": SHARE_FILE, "experiments": NAMES, "baseline": "emb35"}
FIGURES = (
    "ppl_vs_embedding_ratio.png", "ppl_vs_glu_expansion.png", "learning_curves.png", "pareto.png",
)  # fmt: skip
SCRIPT = "scripts/aggregate_results.py"


def aggregate(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = python(SCRIPT, *arguments, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def tabulate(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return aggregate(folder, "--no_figures", *arguments, code=code)


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    """A summary and its details, cell by cell as they are written."""
    tables = []
    for file in (path, run_csv.details_path(path)):
        with file.open(newline="") as lines:
            tables.append({row["run"]: row for row in csv.DictReader(lines)})
    assert list(tables[0]) == list(tables[1])
    return {run: tables[0][run] | tables[1][run] for run in tables[0]}


def tabulated(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of the runs in `folder`/logs."""
    tabulate(folder)
    return rows_of(folder / "results_summary.csv")


def metrics_of(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both PRD sweeps, ranked and in full, with every way in which a run can be incomplete."""
    folder = tmp_path_factory.mktemp("study")
    logs, names = folder / "logs", [*NAMES, "emb15"]
    ranked: dict[str, Any] = {"phase": "rank", "tokens": 5_013_504, "killed": {"emb45": 0.6}}
    write_sweep(logs, SHARE_FILE, SHARE_SWEEP, names=names, **ranked)
    write_sweep(logs, SHARE_FILE, SHARE_SWEEP[:2], seeds=(0, 1, 2), names=names)
    write_sweep(logs, GLU_FILE, GLU_SWEEP, baseline="glu4x")
    sweep = SWEEP | {"experiments": names}
    cut: dict[str, Any] = {"seed": 3, "metrics_json": False, "ran": 0.4}
    write_run(logs / "emb25-seed3", SHARE_SWEEP[1], sweep=sweep, **cut)
    failure = {"kind": "out_of_memory", "message": "CUDA out of memory at step 12"}
    write_run(logs / "emb45", SHARE_SWEEP[2], sweep=sweep, ran=0.1, failure=failure)
    (logs / "emb35-seed9").mkdir()
    (logs / "emb35-seed9" / "config.yaml").write_text("experiment: emb35\nseed: 9\n")
    decided = {"phase": "1", "outcome": "emb25", "p": 0.0123456}
    (logs / "study.json").write_text(json.dumps({"decisions": [decided]}))
    done = aggregate(folder, "--log_dir", "logs", "--output", "results/results_summary.csv")
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_every_run_is_a_row_with_its_status(study: Path) -> None:
    rows = rows_of(study / "results/results_summary.csv")
    folders = {path.name for path in (study / "logs").iterdir() if path.is_dir()}
    assert set(rows) == folders | {"emb15"}
    expected = {
        "emb25": "finished", "emb45-rank": "killed", "emb45": "failed", "emb15": "missing",
        "emb25-seed3": "unfinished", "emb35-seed9": "unfinished",
    }  # fmt: skip
    assert {run: rows[run]["status"] for run in expected} == expected
    assert rows["emb45"]["reason"] == "out_of_memory: CUDA out of memory at step 12"
    assert (rows["emb25-seed3"]["tokens"], rows["emb25-seed3"]["seed"]) == ("20000000", "3")
    assert rows["emb15"]["sweep"] == SHARE_FILE
    message = (study / "stdout").read_text()
    for run in ("emb45-rank", "emb45", "emb25-seed3", "emb15"):
        assert f": {run}: " in message


def test_values_arrive_unchanged_and_missing_ones_stay_empty(study: Path) -> None:
    rows = rows_of(study / "results/results_summary.csv")
    metrics, row = metrics_of(study / "logs/emb25-seed1"), rows["emb25-seed1"]
    for key in ("test_perplexity", "embedding_ratio_built", "flops_per_token", "cost_usd"):
        assert float(row[key]) == metrics[key]
    assert row["baseline"] == "false"
    assert float(row["smallbench_blimp_accuracy"]) == metrics["smallbench"]["blimp"]["accuracy"]
    killed = rows["emb45-rank"]
    assert killed["test_perplexity"] == "" and killed["smallbench_blimp_accuracy"] == ""
    assert float(killed["dev_perplexity"]) > 0
    assert rows["emb15"]["tokens"] == ""


def test_the_figures_stand_beside_the_csv(study: Path) -> None:
    for name in (*FIGURES, "rank_agreement.png"):
        assert is_png(study / "results" / name), name


def test_every_key_is_a_column_of_one_table_and_no_column_is_unlisted(study: Path) -> None:
    summary = study / "results/results_summary.csv"
    first, second = (
        pandas.read_csv(file).columns for file in (summary, run_csv.details_path(summary))
    )
    assert set(first) & set(second) == {"run"} and 30 < len(first) < 50
    tasks = {column for column in second if re.match(r"smallbench_(blimp|arc_easy)_", column)}
    assert set(first) | set(second) == set(metric_keys.KEYS) | tasks and len(tasks) == 6
    # The synthetic runs write exactly the keys of the list.
    assert set(metrics_of(study / "logs/emb25")) == metric_keys.STORED


def test_runs_of_a_phase_that_was_begun_are_missing_by_experiment_and_seed(tmp_path: Path) -> None:
    """emb35 has both seeds in full, emb25 one, emb45 none; a ranking phase of the same sweep, begun
    for one run, lacks the others; a phase never begun lacks nothing."""
    logs, plan = tmp_path / "logs", {"names": NAMES, "planned_seeds": (0, 1)}
    write_sweep(logs, SHARE_FILE, SHARE_SWEEP[:1], seeds=(0, 1), **plan)
    write_sweep(logs, SHARE_FILE, SHARE_SWEEP[1:2], baseline="emb35", seeds=(1,), **plan)
    write_sweep(logs, SHARE_FILE, SHARE_SWEEP[:1], phase="rank", seeds=(0, 3), **plan)
    write_sweep(logs, GLU_FILE, GLU_SWEEP, planned_seeds=(0,))
    missing = {run: row for run, row in tabulated(tmp_path).items() if row["status"] == "missing"}
    assert set(missing) == {
        *("emb25", "emb45", "emb45-seed1"),
        *("emb35-rank-seed1", "emb25-rank", "emb25-rank-seed1", "emb45-rank", "emb45-rank-seed1"),
    }
    row = missing["emb45-rank-seed1"]
    assert (row["phase"], row["seed"], row["sweep"]) == ("rank", "1", SHARE_FILE)
    assert (row["experiment"], row["baseline"], row["tokens"]) == ("emb45", "false", "")
    assert missing["emb35-rank-seed1"]["baseline"] == "true"


def test_what_a_study_did_not_promote_is_not_missing(tmp_path: Path) -> None:
    logs, plan = tmp_path / "logs", {"names": NAMES, "planned_seeds": (0,)}
    write_sweep(logs, SHARE_FILE, SHARE_SWEEP, phase="rank", **plan)
    write_sweep(logs, SHARE_FILE, SHARE_SWEEP[:1], **plan)
    write_sweep(logs, GLU_FILE, GLU_SWEEP[:1], names=["glu2x", "glu4x"], planned_seeds=(0,))

    def missing(states: dict[str, str]) -> set[str]:
        runs = [{"run": run, "state": state} for run, state in states.items()]
        (logs / "study.json").write_text(json.dumps({"sweeps": [SHARE_FILE], "runs": runs}))
        return {run for run, row in tabulated(tmp_path).items() if row["status"] == "missing"}

    assert missing({"emb35": "done", "emb25": "to do"}) == {"emb25", "glu4x"}
    assert missing({"emb35": "done", "20m/emb25": "to do"}) == {"emb25", "glu4x"}
    assert missing({"emb35": "done", "emb25": "assumed"}) == {"glu4x"}


def test_the_bundle_has_what_repeats_every_run_and_is_the_same_each_time(
    study: Path, tmp_path: Path
) -> None:
    path = study / "results" / "results_bundle.json"
    bundle, metrics = json.loads(path.read_text()), metrics_of(study / "logs/emb25-seed1")
    assert metrics["tokenizer_sha256"] in {t["tokenizer_sha256"] for t in bundle["tokens"]}
    assert metrics["git_sha"] in {code["git_sha"] for code in bundle["code"]}
    assert 1 in bundle["seeds"]["emb25"]["full"]
    config = yaml.safe_load((study / "logs/emb25-seed1/config.yaml").read_text())
    assert bundle["runs"]["emb25-seed1"] == config and "emb15" not in bundle["runs"]
    assert bundle["study"]["decisions"] and "costs" not in bundle["study"]
    tabulate(study, "--log_dir", "logs", "--output", tmp_path / "a.csv")
    assert (tmp_path / "results_bundle.json").read_bytes() == path.read_bytes()


def test_what_a_csv_holds_comes_back_with_its_type(tmp_path: Path) -> None:
    """By our own reader, and by the lines of pandas that METRICS.md has."""
    named = {"git_sha": "1234567", "corpus": "007", "smallbench_missing_tasks": "12"}
    write_sweep(tmp_path / "logs", SHARE_FILE, SHARE_SWEEP[:1], **named)
    tabulate(tmp_path)
    (row,) = run_csv.read_csv(tmp_path / "results_summary.csv")
    metrics = metrics_of(tmp_path / "logs/emb35")
    for key in ("smallbench_missing_tasks", "seed", "baseline", "test_loss", "git_sha", "epochs"):
        assert row[key] == metrics[key] and type(row[key]) is type(metrics[key])
    assert row["smallbench_blimp_accuracy"] == metrics["smallbench"]["blimp"]["accuracy"]
    assert "gpu_hours" in row and "embedding_dim" not in row and "reason" not in row
    (code,) = re.findall(r"```python\n(.*?)```", metric_keys.reading(), re.S)
    names: dict[str, Any] = {"pandas": pandas}
    with contextlib.chdir(tmp_path):
        exec(code, names)
    row = names["every"].iloc[0]
    assert (row["git_sha"], row["corpus"], row["run"]) == ("1234567", "007", "emb35")
    assert row["embedding_ratio_asked"] == 0.35 and row["seed"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--from_csv", "x.csv", "--output", "y.csv"), "--report"),
        (("--from_csv", "x.csv"), "--report"),
        (("--from_csv", "gone.csv", "--report", "page.md"), "gone.csv"),
        (("--from_csv", "foreign.csv", "--report", "page.md"), "foreign.csv"),
        (("--metric", "perplexit"), "bits_per_byte"),
        (("--log_dir", "absent"), "run an experiment first"),
        (("--log_dir", "empty"), "run an experiment first"),
        (("--log_dir", "x.csv"), "run an experiment first"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_nothing_is_written(
    tmp_path: Path, wrong: tuple[str, ...], message: str
) -> None:
    (tmp_path / "x.csv").write_text("run,status\na,finished\n")
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "page.md").write_text("no tables")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    done = aggregate(tmp_path, *wrong, code=78)
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_refuses_an_unknown_option_from_any_directory(tmp_path: Path) -> None:
    """The one start of a process: the others run the same file in this one."""
    line = [sys.executable, "-W", "error", str(ROOT / SCRIPT), "--nonsense"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 78 and done.stderr.count("\n") == 1 and "--nonsense" in done.stderr


def test_what_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    write_sweep(tmp_path / "logs", SHARE_FILE, SHARE_SWEEP[:1])
    (tmp_path / "taken").write_text("")
    done = tabulate(tmp_path, "--output", "taken/table.csv", code=74)
    assert done.stderr.count("\n") == 1 and "taken" in done.stderr


def test_an_undocumented_key_is_tabulated_and_told(tmp_path: Path) -> None:
    write_sweep(tmp_path / "logs", SHARE_FILE, SHARE_SWEEP[:2], new_number=3)
    assert "new_number" in tabulate(tmp_path).stdout
    assert rows_of(tmp_path / "results_summary.csv")["emb25"]["new_number"] == "3"


def test_a_broken_metrics_file_is_a_failed_run_not_a_crash(tmp_path: Path) -> None:
    """Runs are found in subfolders, and not inside runs."""
    logs = tmp_path / "logs/monday"
    write_sweep(logs, SHARE_FILE, SHARE_SWEEP)
    inner = logs / "emb25/checkpoints/step-10"
    inner.mkdir(parents=True)
    (inner / "config.yaml").write_text("experiment: not a run\n")
    (logs / "emb25/metrics.json").write_text('{"run": ')
    (logs / "emb45/config.yaml").write_text("{")
    with (logs / "emb35/metrics.jsonl").open("a") as file:
        file.write('{"kind": "dev", "tok')
    rows = tabulated(tmp_path)
    assert set(rows) == {f"monday/{name}" for name in NAMES}
    broken = rows["monday/emb25"]
    assert broken["status"] == "failed" and "metrics.json" in broken["reason"]
    assert rows["monday/emb45"]["status"] == "finished"


# --- tokenizers ---------------------------------------------------------------------------------


def test_mixed_tokenizers_are_drawn_in_bits_per_byte_alone(tmp_path: Path) -> None:
    write_sweep(tmp_path / "logs", SHARE_FILE, SHARE_SWEEP[:2])
    write_run(tmp_path / "logs/emb45", SHARE_SWEEP[2], sweep=SWEEP, tokenizer_sha256="ab" * 32)
    done = aggregate(tmp_path, code=78)
    assert "emb45" in done.stderr and "emb25" in done.stderr and "bits_per_byte" in done.stderr
    assert not (tmp_path / "ppl_vs_embedding_ratio.png").exists()
    assert len(rows_of(tmp_path / "results_summary.csv")) == 3  # the table holds both all the same
    aggregate(tmp_path, "--metric", "bits_per_byte")
    assert is_png(tmp_path / "ppl_vs_embedding_ratio.png")


def test_a_vocabulary_sweep_beside_the_share_sweep_is_drawn_in_bits_per_byte(
    tmp_path: Path,
) -> None:
    write_sweep(tmp_path / "logs", SHARE_FILE, SHARE_SWEEP)
    experiments = [
        Experiment(name=f"v{v}-{s}", share=s, vocab_size=v)
        for v in (8_000, 16_000)
        for s in (0.25, 0.35)
    ]
    write_sweep(tmp_path / "logs", "configs/vocab_tying.yaml", experiments, baseline="v16000-0.35")
    aggregate(tmp_path)
    assert is_png(tmp_path / "bits_per_byte_vs_embedding_ratio.png")
    assert is_png(tmp_path / "ppl_vs_embedding_ratio.png")


def test_a_vocabulary_sweep_alone_cannot_be_a_perplexity_figure(tmp_path: Path) -> None:
    experiments = [Experiment(name=f"v{v}", vocab_size=v) for v in (8_000, 16_000)]
    write_sweep(tmp_path / "logs", "configs/vocab_tying.yaml", experiments)
    done = aggregate(tmp_path, code=78)
    assert "dev bits per byte v" in done.stdout and "dev perplexity v" not in done.stdout


# --- the report ---------------------------------------------------------------------------------

REPORT = (
    "# Report\n\nProse before.\n\n<!-- table:metrics-full -->\nold\n<!-- /table:metrics-full -->\n"
    "\nProse between.\n<!-- table:cost -->"
    "<!-- /table:cost -->\n<!-- table:summary --><!-- /table:summary -->\nProse after.\n"
)


def test_the_report_gets_its_tables_and_keeps_its_prose(study: Path, tmp_path: Path) -> None:
    report = tmp_path / "REPORT.md"
    report.write_text(REPORT + "<!-- table:decisions --><!-- /table:decisions -->\n")
    output = tmp_path / "results_summary.csv"
    tabulate(study, "--log_dir", "logs", "--output", output, "--report", report)
    text = report.read_text()
    for prose in ("Prose before.", "Prose between.", "Prose after."):
        assert prose in text
    assert "old" not in text
    full = text[text.index("table:metrics-full") : text.index("/table:metrics-full")]
    line = next(line for line in full.splitlines() if "emb25" in line)
    runs = [study / f"logs/emb25{seed}" for seed in ("", "-seed1", "-seed2")]
    values = pandas.Series([metrics_of(run)["test_perplexity"] for run in runs])
    assert f"| 3 | {values.mean():.2f} ± {values.std():.2f} |" in line
    assert "(25.0 %)" in line
    assert "**(baseline)**" in full and "-rank" not in full
    cost = text[text.index("table:cost") : text.index("/table:cost")]
    assert "| rank | killed | 1 |" in cost and "missing" not in cost
    assert "| 1 | emb25 | 0.01235 |" in text


def test_the_report_made_from_the_csv_is_the_same_and_can_be_checked(
    study: Path, tmp_path: Path
) -> None:
    report, output = tmp_path / "REPORT.md", tmp_path / "results_summary.csv"
    report.write_text(REPORT)
    tabulate(study, "--log_dir", "logs", "--output", output, "--report", report)
    from_runs = report.read_text()
    report.write_text(REPORT)
    fill = ("--from_csv", output, "--report", report)
    tabulate(tmp_path, *fill, "--check", code=78)
    assert report.read_text() == REPORT  # --check writes nothing
    tabulate(tmp_path, *fill)
    assert report.read_text() == from_runs
    tabulate(tmp_path, *fill, "--check")
    # The study of these results lies beside them, whatever stands in logs/.
    report.write_text("<!-- table:decisions --><!-- /table:decisions -->")
    shutil.copy(study / "logs/study.json", tmp_path)
    tabulate(tmp_path, *fill)
    assert "| 1 | emb25 |" in report.read_text()
    report.write_text(from_runs.replace("| emb25", "| emb24", 1))
    assert "differ" in tabulate(tmp_path, *fill, "--check", code=78).stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table:metrcs -->\n<!-- /table:metrcs -->", "metrics-full"),
        ("<!-- table:metrics -->\n", "no <!-- /table:metrics -->"),
        ("<!-- table:decisions --><!-- /table:decisions -->", "study.json"),
    ],
)
def test_a_marker_that_cannot_be_served_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write_sweep(tmp_path / "logs", SHARE_FILE, SHARE_SWEEP[:1])
    (tmp_path / "REPORT.md").write_text(text)
    assert message in tabulate(tmp_path, "--report", "REPORT.md", code=78).stderr
    assert (tmp_path / "REPORT.md").read_text() == text


# --- panels, without drawing --------------------------------------------------------------------


def panels(logs: Path) -> dict[str, list[list[object]]]:
    runs = run_csv.table(run_table.read_rows(logs))
    return {
        axis.quantity.built: [
            [b.sweep, b.phase, b.budget, sorted(b.runs["run"]), list(b.killed["run"])]
            for b in blocks(sweep_figures.runs_of_axis(runs, axis))
        ]
        for axis in (sweep_figures.SHARE, sweep_figures.GLU)
    }


def test_phases_sweeps_and_budgets_never_share_a_panel(study: Path, tmp_path: Path) -> None:
    drawn = panels(study / "logs")
    full = [f"{name}{seed}" for name in ("emb25", "emb35") for seed in ("", "-seed1", "-seed2")]
    assert drawn["embedding_ratio_built"] == [
        [SHARE_FILE, "rank", 5.0e6, ["emb25-rank", "emb35-rank"], ["emb45-rank"]],
        [SHARE_FILE, "full", 5.0e7, full, []],
    ]
    assert drawn["glu_expansion_built"] == [
        [GLU_FILE, "full", 5.0e7, ["glu266x", "glu2x", "glu3x", "glu4x"], []]
    ]
    write_sweep(tmp_path, SHARE_FILE, SHARE_SWEEP[:2], tokens=50_000_000)
    write_run(tmp_path / "emb45", SHARE_SWEEP[2], sweep=SWEEP, tokens=1_000_000)
    assert [p[2] for p in panels(tmp_path)["embedding_ratio_built"]] == [1.0e6, 5.0e7]


# --- prices -------------------------------------------------------------------------------------


def test_every_price_is_positive_dated_and_sourced() -> None:
    table = yaml.safe_load((ROOT / "configs/prices.yaml").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", table["as_of"])
    for key, price in table["devices"].items():
        needed = {"match", "usd_per_hour", "kind", "read_on", "source"}
        assert set(price) - {"tflops"} == needed, key
        assert price["usd_per_hour"] > 0 and price.get("tflops", 1) > 0
        assert price["kind"] in ("spot", "on-demand", "marketplace")
        dated = price["read_on"] and re.fullmatch(r"\d{4}-\d\d-\d\d", price["read_on"])
        assert dated or "assumption" in price["source"] or "undated" in price["source"], key
