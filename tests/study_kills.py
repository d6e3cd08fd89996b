"""A whole study in miniature, once uninterrupted and again under kills; both must end the same.

    python -m tests.study_kills                        30 kills a chain, about 20 minutes
    python -m tests.study_kills --kills 5 --chains 1   a sample

From an empty log directory to the report's tables, through the real commands: `run_experiment.py
--study`, then `aggregate_results.py --report`. Each chain kills them at random instants (TERM or
KILL, to the study, to one of its runs, or to everything at once, as when a machine goes) and
starts again at once, so that what a killed study left behind is still there. Compared: the
report's tables, the CSV, the decisions and every run's rows, all but clocks.
Writes study_kills.json and study_kills.md into --output.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests import ROOT
from tests.faults.bench import CLOCKS, clean_environment, rows, say

HUNG_S = 1_800  # a started command without an end is a failure
BASE: dict[str, Any] = {
    "model": {"total_params": 98_192, "vocab_size": 304},
    "training": {
        "tokens": 15_360, "ranking_tokens": 7_680, "batch_size": 8, "seq_len": 32,
        "dev_tokens": 256, "threads": 1, "precision": "fp32", "checkpoint_every_steps": 10,
    },
    "evaluation": {
        "perplexity_tokens": 400, "smallbench_limit": 2, "latency_repeats": 3, "latency_warmup": 0,
    },
}  # fmt: skip
SWEEPS: dict[str, list[dict[str, Any]]] = {
    # The baseline is the best cell by far, so that no stopwatch decides who wins.
    "embed": [
        {"name": "e15", "embedding_ratio": 0.147},
        {"name": "e10", "embedding_ratio": 0.098},
    ],
    "glu": [{"name": "g27", "glu_expansion": 2.66}, {"name": "g15", "glu_expansion": 1.5}],
    "vocab": [
        {"name": "a"},
        {"name": "b", "vocab_size": 312},
        {"name": "c", "vocab_size": 312, "tie_embeddings": False},
    ],
}
STUDY: dict[str, Any] = {
    "corpus": "corpus", "device": "cpu", "tokens_per_s": 10_000,
    "blocks": [
        {"name": "sanity", "config": "embed.yaml", "phase": "sanity", "experiments": ["e15"]},
        {"name": "noise", "config": "embed.yaml", "phase": "rank", "experiments": ["e15"],
         "seeds": [0, 1]},
        {"name": "share", "config": "embed.yaml", "phase": "rank"},
        {"name": "glu", "config": "glu.yaml", "leader_of": "share", "phase": "rank"},
        {"name": "vocabulary", "config": "vocab.yaml", "grid_of": "share", "phase": "rank"},
        {"name": "finals", "finalists_of": ["share", "glu"], "seeds": [0, 1]},
        {"name": "shares-full", "config": "embed.yaml"},
        {"name": "glu-full", "config": "glu.yaml", "leader_of": "share"},
    ],
}  # fmt: skip
TABLES = ("metrics", "cost", "decisions")
# Columns of the report's tables that hold clocks or money.
TIMED = {"latency L=128", "latency L=512", "USD", "wall hours", "GPU hours"}
WAYS = ("TERM study", "KILL study", "KILL all", "TERM run", "KILL run")


# ------------------------------------------------------------------------------------- the bench


def build(work: Path) -> None:
    """A copy of the code (somebody may be editing it), the corpus, the sweeps and the report's
    frame; the study makes the tokens itself."""
    for name in ("src", "scripts", "configs"):
        shutil.copytree(ROOT / name, work / "code" / name)
    shutil.copy(ROOT / "run_experiment.py", work / "code")
    size = ("--documents", "60", "--lexicon", "64")
    script = str(ROOT / "scripts" / "make_corpus.py")
    subprocess.run(
        [sys.executable, script, "--output", str(work / "corpus"), *size],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    smallbench = work / "corpus" / "smallbench"
    evaluation = {
        **BASE["evaluation"], "smallbench_dir": str(smallbench),
        "smallbench_tasks": str(work / "corpus" / "smallbench.yaml"),
    }  # fmt: skip
    for name, experiments in SWEEPS.items():
        content = {**BASE, "evaluation": evaluation, "data": {"dir": "tokens"}}
        if name != "embed":
            content["model"] = {**BASE["model"], "embedding_ratio": 0.147}
        content["experiments"] = experiments
        (work / f"{name}.yaml").write_text(yaml.safe_dump(content))
    frame = "".join(f"<!-- table:{name} -->\n<!-- /table:{name} -->\n\n" for name in TABLES)
    (work / "frame.md").write_text(frame)


def commands(work: Path, name: str, jobs: int) -> list[list[str]]:
    """What `make study` runs, for the log directory `name` with tokens of its own."""
    folder, code = work / name, work / "code"
    folder.mkdir()
    shutil.copy(work / "frame.md", folder / "REPORT.md")
    tokens = f"data.dir={folder / 'tokens'}"
    study = {**STUDY, "jobs": jobs, "log_dir": str(folder / "logs"), "overrides": [tokens]}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    logs, table = str(folder / "logs"), str(folder / "results_summary.csv")
    return [
        [sys.executable, str(code / "run_experiment.py"), "--study", str(folder / "study.yaml")],
        [sys.executable, str(code / "scripts" / "aggregate_results.py"), "--log_dir", logs,
         "--output", table, "--report", str(folder / "REPORT.md")],
    ]  # fmt: skip


class Command:
    """A started command, the head of a process group of its own."""

    def __init__(self, line: Sequence[str], work: Path, log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                line, cwd=work, stdout=out, stderr=out, env=clean_environment(),
                start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float) -> int | None:
        """The exit code, None while it runs on."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def wait_for_jobs(self, count: int) -> int | None:
        """Let `count` jobs begin, so that kills reach the later stages; the exit code or None."""
        wanted = len(_begun(self.log)) + count
        while (code := self.wait(0.1)) is None and len(_begun(self.log)) < wanted:
            pass
        return code

    def runs(self) -> list[int]:
        """Processes of its jobs now."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return [int(pid) for pid in listed.read_text().split()]
        except OSError:
            return []

    def strike(self, way: str, draw: random.Random) -> bool:
        """Do it; False where there was nothing to hit."""
        name, _, target = way.partition(" ")
        number = signal.Signals[f"SIG{name}"]
        runs = self.runs()
        try:
            if target == "all":
                os.killpg(self.process.pid, number)
            elif target == "study":
                os.kill(self.process.pid, number)
            elif runs:
                os.kill(draw.choice(runs), number)
            else:
                return False
        except ProcessLookupError:
            return False
        return True


def chain(
    lines: Sequence[Sequence[str]], work: Path, log: Path, kills: int, draw: random.Random
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run the commands to their ends with `kills` kills on the way: (what was hit, problems)."""
    hits: list[dict[str, Any]] = []
    problems: list[str] = []
    position, begun = 0, time.monotonic()
    while position < len(lines):
        command = Command(lines[position], work, log)
        struck = None
        if len(hits) < kills:
            code = command.wait_for_jobs(draw.randrange(5) if position == 0 else 0)
            delay = draw.uniform(0.0, 6.0 if position == 0 else 3.0)
            code = command.wait(delay) if code is None else code
            way = draw.choice(WAYS) if position == 0 else draw.choice(WAYS[:3])
            if code is None and way.endswith("run") and not command.runs():  # between two jobs
                way = way.replace("run", "study")
            if code is None and command.strike(way, draw):
                struck = way
                hits.append({"way": way, "stage": _stage(log, position), "after_s": delay})
                say(f"{log.parent.name}: {len(hits)} {way} in {hits[-1]['stage']}")
        code = command.wait(HUNG_S)
        if code is None:
            os.killpg(command.process.pid, signal.SIGKILL)
            return hits, [*problems, f"hung after {struck}"]
        if code == 0:
            position += 1
            continue
        expected = {75, -signal.SIGKILL, -signal.SIGTERM} if struck else {75}
        if code not in expected:
            told = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            problems.append(f"exit code {code} after {struck or 'no kill'}: {told}")
            if code in (70, 74, 78):  # it would say so for ever
                return hits, problems
        if struck is None and len(hits) >= kills and time.monotonic() - begun > 3600:
            return hits, [*problems, "does not come to an end"]
    return hits, problems


def _stage(log: Path, position: int) -> str:
    if position:
        return "aggregation"
    begun = _begun(log)
    return begun[-1] if begun else "start"


def _begun(log: Path) -> list[str]:
    """The stage of every job that the commands of a log have begun."""
    return re.findall(r"^--- (.+?): ", log.read_text(encoding="utf-8", errors="replace"), re.M)


# ------------------------------------------------------------------------------------- the judge


def compare(found: Path, expected: Path) -> list[str]:
    """What of two studies is not the same, clocks aside."""
    problems = [
        f"{name} differ"
        for name, same in (
            ("the report's tables", report(found) == report(expected)),
            ("the decisions", decisions(found) == decisions(expected)),
        )
        if not same
    ]
    ours, theirs = table(found), table(expected)
    if list(ours) != list(theirs):
        problems.append(f"the CSV's runs differ: {sorted(set(ours) ^ set(theirs))}")
    for run in ours.keys() & theirs.keys():
        keys = [key for key in theirs[run] if ours[run].get(key) != theirs[run][key]]
        if keys:
            problems.append(f"the CSV's row {run} differs in {', '.join(keys)}")
    for path in sorted((expected / "logs").glob("*/metrics.jsonl")):
        if rows(path.parent) != rows(found / "logs" / path.parent.name):
            problems.append(f"{path.parent.name}/metrics.jsonl differs")
    for path in found.rglob("*.tmp"):
        problems.append(f"left behind: {path.relative_to(found)}")
    return problems


def is_clock(column: str) -> bool:
    """Whether a CSV's column may differ between two machines' hours."""
    named = ("path", "tokens_per_s", "process_peak_memory_mib", "train_peak_memory_mib")
    return column.endswith(CLOCKS) and not column.endswith("_mib") or column in named or (
        "_ms_" in column
    )  # fmt: skip


def table(folder: Path) -> dict[str, dict[str, str]]:
    """The CSV without clocks, by run."""
    with (folder / "results_summary.csv").open(newline="", encoding="utf-8") as file:
        return {
            row["run"]: {key: value for key, value in row.items() if not is_clock(key)}
            for row in csv.DictReader(file)
        }


def decisions(folder: Path) -> list[dict[str, str]]:
    """study.json's decisions without money and without what stopwatches said."""
    content = json.loads((folder / "logs" / "study.json").read_text(encoding="utf-8"))
    assert content["complete"] is True
    return [
        {**row, "reason": _untimed(row["reason"])}
        for row in content["decisions"]
        if row["phase"] != "all" and "latency, interleaved" not in row["rule"]
    ]


def _untimed(reason: str) -> str:
    return "; ".join(part for part in reason.split("; ") if not part.startswith("latency at"))


def report(folder: Path) -> list[list[str]]:
    """Every table of the report as rows of cells, without the timed columns and rows."""
    lines: list[list[str]] = []
    head: list[str] = []
    for line in (folder / "REPORT.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            head = []
            lines.append([line])
            continue
        head = head or [cell.strip() for cell in cells]
        if "cost of the" in line or "latency, interleaved" in line:
            continue
        kept = [c for name, c in zip(head, cells, strict=True) if name not in TIMED]
        lines.append([_untimed(cell) for cell in kept])
    return lines


# ----------------------------------------------------------------------------------- the command


def uninterrupted(work: Path, seed: int) -> list[str]:
    """The study that the others are compared with, in `whole`; returns its problems."""
    say("the uninterrupted study")
    lines = commands(work, "whole", 1)
    return chain(lines, work, work / "whole" / "out.log", 0, random.Random(seed))[1]


def trial(
    work: Path, seed: int, kills: int, chains: int, known: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The chains after those `known`, and what all are compared with, as study_kills.json has
    it."""
    problems: list[str] = []
    if not (work / "whole" / "results_summary.csv").is_file():
        build(work)
        problems = uninterrupted(work, seed)
    found: dict[str, Any] = {
        "seed": seed, "uninterrupted_problems": problems, "chains": list(known)
    }  # fmt: skip
    content = json.loads((work / "whole" / "logs" / "study.json").read_text())
    found["runs"] = len(content["runs"])
    found["decisions"] = len(decisions(work / "whole"))
    for number in range(len(known), len(known) + chains):
        jobs = 1 + number % 2
        name, draw = f"cut{number}", random.Random(f"{seed}:{number}")
        begun = time.monotonic()
        shutil.rmtree(work / name, ignore_errors=True)
        lines = commands(work, name, jobs)
        hits, wrong = chain(lines, work, work / name / "out.log", kills, draw)
        wrong += compare(work / name, work / "whole") if not wrong else []
        found["chains"].append(
            {
                "jobs": jobs,
                "kills": len(hits),
                "seconds": round(time.monotonic() - begun),
                "by_way": dict(sorted(Counter(hit["way"] for hit in hits).items())),
                "by_stage": dict(sorted(Counter(hit["stage"] for hit in hits).items())),
                "problems": wrong,
            }
        )
        say(f"{name}: {len(hits)} kills, {len(wrong)} problems {wrong[:3]}")
    found["passed"] = not problems and all(not c["problems"] for c in found["chains"])
    return found


def markdown(found: dict[str, Any]) -> str:
    """The outcome for people."""
    lines = [
        "# A study under kills",
        "",
        f"`python -m tests.study_kills --seed {found['seed']}`: {found['runs']} jobs from an "
        f"empty directory to the report's tables. "
        f"{'All chains ended' if found['passed'] else 'NOT all chains ended'} with equal report "
        f"tables, CSV, rows of every run and {found['decisions']} decisions, clocks aside.",
        "",
        "| chain | runs at a time | kills | seconds | how | where | problems |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, chain_ in enumerate(found["chains"], start=1):
        how, where = (_counts(chain_[key]) for key in ("by_way", "by_stage"))
        problems = "; ".join(chain_["problems"]).replace("\n", " ")[:300] or "none"
        lines.append(
            f"| {number} | {chain_['jobs']} | {chain_['kills']} | {chain_['seconds']} | {how} | "
            f"{where} | {problems} |"
        )
    return "\n".join(lines) + "\n"


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items()) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trial; 0 where everything ended the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("study_kills"), help="made, and emptied")
    parser.add_argument(
        "--again", action="store_true", help="more chains for the uninterrupted study of --work"
    )
    parser.add_argument("--output", type=Path, help="default: --work")
    parser.add_argument("--kills", type=int, default=30, help="a chain")
    parser.add_argument("--chains", type=int, default=2, help="every other with two runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    work = asked.work.resolve()
    if not asked.again:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    output = asked.output or work
    output.mkdir(parents=True, exist_ok=True)
    record = output / "study_kills.json"
    known = json.loads(record.read_text())["chains"] if asked.again and record.is_file() else []
    found = trial(work, asked.seed, asked.kills, asked.chains, known)
    record.write_text(json.dumps(found, indent=1) + "\n")
    (output / "study_kills.md").write_text(markdown(found))
    print(markdown(found))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
