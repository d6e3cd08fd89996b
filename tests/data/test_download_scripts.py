"""The download scripts, and what all data scripts say of wrong arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.data import (
    CLOSED_PORT,
    asking,
    hashes,
    hub,
    refused,
    run,
    run_alone,
    sha256,
    small_corpus,
    texts_of,
)
from tests.tiny_hub import COMMIT, CONVERTED_COMMIT, CONVERTED_FOLDER, tiny_hub
from tests.tiny_mirror import ARTICLES, write_tiny_tasks

# Corpora


def test_wikitext_lines_become_articles_and_nothing_is_lost(wikitext: Path, mirror: Path) -> None:
    source = json.loads((wikitext / "source.json").read_bytes())
    assert (source["dataset"], source["config"]) == ("Salesforce/wikitext", "wikitext-2-v1")
    assert source["mirror"] is True and source["revision"] is None
    assert source["licence"] == "cc0-1.0"
    for split, facts in source["splits"].items():
        file = wikitext / f"{split}.jsonl"
        texts = texts_of(file)
        rows = pq.read_table(
            mirror / "Salesforce/wikitext/wikitext-2-v1" / f"{split}-00000-of-00001.parquet"
        )
        lines = rows.column("text").to_pylist()
        # Sections and lines of formulas that look like titles start no article.
        assert len(texts) == ARTICLES[split] == facts["documents"]
        assert all(text.startswith(" = ") and text.endswith(" \n") for text in texts)
        assert " \n".join(texts).split() == "".join(lines).split()
        assert facts["words"] == sum(len(line.split()) for line in lines)
        assert facts["bytes"] == sum(len(text.encode()) for text in texts)
        assert facts["sha256"] == sha256(file)
    assert "/" not in source["config"] and str(mirror) not in (wikitext / "source.json").read_text()
    first = texts_of(wikitext / "test.jsonl")[0].split("\n")  # blank lines have their bytes again
    assert first[0].startswith(" = ") and first[1] == " " and first[2].endswith(" <unk> – @-@ . ")


def test_splits_that_are_there_stay_whatever_is_asked_next(tmp_path: Path, mirror: Path) -> None:
    output = tmp_path / "corpus"
    for split in ("validation", "test"):
        run("download_wikitext.py", "--output", output, "--mirror", mirror, "--splits", split)
    splits = json.loads((output / "source.json").read_bytes())["splits"]
    assert set(splits) == {"validation", "test"}
    assert all(
        sha256(output / f"{name}.jsonl") == facts["sha256"] for name, facts in splits.items()
    )


def test_a_finished_corpus_is_verified_kept_and_replaced_only_by_force(
    tmp_path: Path, mirror: Path
) -> None:
    output = tmp_path / "corpus"
    command = ("download_wikitext.py", "--output", output, "--mirror", mirror)
    run(*command)
    before = hashes(output)
    # Without hub and mirror: what is there whole needs neither.
    assert "nothing to do" in run("download_wikitext.py", "--output", output)
    message = refused(*command, "--dataset", "tiny/prose")
    assert "Salesforce/wikitext" in message and "--force" in message
    assert hashes(output) == before

    with (output / "test.jsonl").open("ab") as file:
        file.write(b"\n")
    assert "test.jsonl" in refused(*command)
    run(*command, "--force")
    assert hashes(output) == before

    run(*command, "--dataset", "tiny/prose:default", "--force")  # any texts in the hub's layout
    assert json.loads((output / "source.json").read_bytes())["dataset"] == "tiny/prose"
    shards = sorted((mirror / "tiny/prose/default").glob("train-*.parquet"))
    rows = [text for shard in shards for text in pq.read_table(shard).column("text").to_pylist()]
    assert len(shards) == 2 and texts_of(output / "train.jsonl") == rows
    assert not (output / ".partial").exists()


def test_a_cut_download_is_not_taken_for_a_whole_one(tmp_path: Path, mirror: Path) -> None:
    output = tmp_path / "corpus"
    (output / ".partial").mkdir(parents=True)
    (output / "train.jsonl").write_text('{"text": "half"}\n')
    assert "other origin" in refused("download_wikitext.py", "--output", output, "--mirror", mirror)
    (output / ".lock").touch()  # a command of ours was here
    (output / ".partial" / "left").write_text("over")
    run("download_wikitext.py", "--output", output, "--mirror", mirror)
    assert len(texts_of(output / "train.jsonl")) == ARTICLES["train"]


def test_a_missing_split_is_named_and_never_replaced(tmp_path: Path, mirror: Path) -> None:
    output = tmp_path / "raw"
    message = refused(
        "download_wikitext.py",
        *("--output", output, "--mirror", mirror, "--dataset", "wikitext-2-raw-v1"),
    )
    assert "lacks the split train" in message
    assert "wikitext-2-v1 (test, train, validation)" in message
    assert not list(output.glob("*.json*"))
    splits = ["--splits", "validation", "test"]  # a corpus to evaluate on
    arguments = ["--output", output, "--mirror", mirror, "--dataset", "wikitext-2-raw-v1", *splits]
    run("download_wikitext.py", *arguments)
    assert {path.name for path in output.glob("*.jsonl")} == {"test.jsonl", "validation.jsonl"}
    assert "nothing to do" in run("download_wikitext.py", *arguments)
    assert "splits.train" in refused(
        "preprocess_lm.py", "--input", output, "--vocab_size", "300", "--output", tmp_path / "t"
    )


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("wikitext-3", "--dataset"),
        ("../../etc", "--dataset"),
        ("tiny/absent", "tiny/absent"),
        ("tiny/prose:other", "default (test, train, validation)"),
        ("nyu-mll/glue:sst2", "validation"),
        ("wikitext-103-raw-v1", "wikitext-103-raw-v1"),
    ],
)
def test_datasets_that_cannot_be_had(
    tmp_path: Path, mirror: Path, dataset: str, expected: str
) -> None:
    arguments = ("--output", tmp_path / "x", "--mirror", mirror, "--dataset", dataset)
    assert expected in refused("download_wikitext.py", *arguments)


def test_a_dataset_without_texts_is_refused_by_its_columns(tmp_path: Path, mirror: Path) -> None:
    for split in ("train", "validation", "test"):
        table = pq.read_table(mirror / "nyu-mll/glue/sst2/validation-00000-of-00001.parquet")
        folder = tmp_path / "mirror" / "tiny" / "labels" / "default"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    message = refused(
        "download_wikitext.py",
        *("--output", tmp_path / "x", "--dataset", "tiny/labels"),
        HUB_MIRROR=str(tmp_path / "mirror"),
    )
    assert "sentence, label, idx" in message


@pytest.mark.parametrize("script", ["download_wikitext.py", "download_smallbench.py"])
def test_without_hub_and_mirror_the_way_out_is_named(tmp_path: Path, script: str) -> None:
    with asking(CLOSED_PORT):
        message = refused(script, "--output", tmp_path / "x")
    assert "HUB_MIRROR" in message and CLOSED_PORT in message
    with asking(CLOSED_PORT, offline=True):
        assert "HF_HUB_OFFLINE" in refused(script, "--output", tmp_path / "x")
    absent = refused(script, "--output", tmp_path / "x", HUB_MIRROR=str(tmp_path / "absent"))
    assert str(tmp_path / "absent") in absent


def test_a_hub_that_is_no_address_is_refused(tmp_path: Path) -> None:
    """The hub's client reads it at its import."""
    arguments = ("--output", tmp_path / "x")
    message = run_alone("download_wikitext.py", *arguments, exit_code=78, HF_ENDPOINT="http://[::1")
    assert "HF_ENDPOINT: found http://[::1, expected an address" in message


def test_the_hub_and_its_mirror_give_the_same_corpus(
    tmp_path: Path, mirror: Path, wikitext: Path
) -> None:
    output = tmp_path / "wikitext-2"
    with tiny_hub(mirror) as address:
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        run_alone("download_wikitext.py", "--output", output, **environment)
    source = json.loads((output / "source.json").read_bytes())
    of_mirror = json.loads((wikitext / "source.json").read_bytes())
    assert source == {**of_mirror, "mirror": False, "revision": COMMIT}


def test_what_the_hub_cannot_give_is_refused(tmp_path: Path, mirror: Path) -> None:
    """Also data sets that lack a file, or hold one that is none."""
    shutil.copytree(mirror, tmp_path / "hub")
    for name, content in {
        "gap": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }.items():
        shutil.copytree(mirror / "tiny/prose", tmp_path / "hub" / "tiny" / name)
        file = tmp_path / "hub" / "tiny" / name / "default" / "train-00001-of-00002.parquet"
        file.write_bytes(content) if content else file.unlink()
    with hub(tmp_path / "hub"):
        for name, expected in {
            "wikitext-2-raw-v1": "lacks the split train",
            "tiny/absent": "no dataset",
            "tiny/prose:other": "'default'",
            "tiny/gap": "tiny/gap: default/train: found 1",
            "tiny/pointer": "arquet",
        }.items():
            arguments = ("--output", tmp_path / "x", "--dataset", name)
            assert expected in refused("download_wikitext.py", *arguments), name


def test_datasets_of_the_script_era_come_from_the_hubs_own_parquet(
    tmp_path: Path, mirror: Path
) -> None:
    dataset = tmp_path / "hub" / "old" / "script"
    for split in ("train", "validation", "test"):
        folder = dataset / CONVERTED_FOLDER / "plain_text" / split
        folder.mkdir(parents=True)
        file = mirror / "tiny/prose/default" / "test-00000-of-00001.parquet"
        shutil.copy(file, folder / "0000.parquet")
    (dataset / "script.py").write_text("raise SystemExit('never run')\n")
    with hub(tmp_path / "hub"):
        run("download_wikitext.py", "--output", tmp_path / "corpus", "--dataset", "old/script")
        other = ("--output", tmp_path / "x", "--dataset", "old/script:other")
        assert "plain_text" in refused("download_wikitext.py", *other)
    source = json.loads((tmp_path / "corpus" / "source.json").read_bytes())
    assert (source["config"], source["revision"]) == ("plain_text", CONVERTED_COMMIT)
    assert source["splits"]["test"]["documents"] == ARTICLES["test"]


def test_smallbench_from_the_hub_leaves_out_what_only_mirrors_have(
    tmp_path: Path, mirror: Path
) -> None:
    tasks_file, output = write_tiny_tasks(tmp_path / "tasks.yaml"), tmp_path / "smallbench"
    with hub(mirror):
        printed = run("download_smallbench.py", "--output", output, "--tasks", tasks_file)
    assert "left out" in printed and "subj" in printed
    source = json.loads((output / "source.json").read_bytes())
    assert source["mirror"] is False and "subj" not in source["tasks"]
    assert len(source["tasks"]) == 4
    assert {task["revision"] for task in source["tasks"].values()} == {COMMIT}


def test_a_transfer_that_breaks_off_exits_74_and_leaves_nothing(
    tmp_path: Path, mirror: Path
) -> None:
    output = tmp_path / "corpus"
    with hub(mirror, cut_files=True):
        arguments = ("--output", output, "--dataset", "tiny/prose")
        assert "tiny/prose" in run("download_wikitext.py", *arguments, exit_code=74)
    assert [path.name for path in output.iterdir()] == [".lock"]


# SmallBench


def test_smallbench_keeps_raw_rows_with_their_numbers(tmp_path: Path, mirror: Path) -> None:
    tasks_file = write_tiny_tasks(tmp_path / "tasks.yaml")
    output = tmp_path / "new" / "smallbench"
    arguments = ("--output", output, "--tasks", tasks_file, "--mirror", mirror)
    run("download_smallbench.py", *arguments)
    source = json.loads((output / "source.json").read_bytes())
    listed = {task["name"]: task for task in yaml.safe_load(tasks_file.read_text())["tasks"]}
    assert source["mirror"] is True and source["tasks"].keys() == listed.keys()
    for name, facts in source["tasks"].items():
        task = listed[name]
        assert all(facts[key] == task[key] for key in ("path", "config", "split"))
        folder = mirror / task["path"] / task["config"]
        rows = pq.read_table(folder / f"{task['split']}-00000-of-00001.parquet").to_pylist()
        lines = (output / f"{name}.jsonl").read_bytes().splitlines()
        expected = [{"_row": i, **row} for i, row in enumerate(rows)]
        assert [json.loads(line) for line in lines] == expected
        assert facts["rows"] == len(rows) and facts["sha256"] == sha256(output / f"{name}.jsonl")


def test_smallbench_downloads_only_what_the_list_gained(tmp_path: Path, mirror: Path) -> None:
    listed = yaml.safe_load(write_tiny_tasks(tmp_path / "all.yaml").read_text())["tasks"]
    tasks_file, output = tmp_path / "tasks.yaml", tmp_path / "smallbench"
    common = ("--output", output, "--tasks", tasks_file, "--mirror", mirror)

    def downloaded() -> set[str]:
        return {path.name for path in output.glob("*.jsonl")}

    tasks_file.write_text(yaml.safe_dump({"tasks": listed[:2]}))
    run("download_smallbench.py", *common)
    kept = {name: (output / name).stat().st_mtime_ns for name in downloaded()}
    assert "nothing to do" in run("download_smallbench.py", *common)
    tasks_file.write_text(yaml.safe_dump({"tasks": listed[:3]}))
    assert "1 tasks from" in run("download_smallbench.py", *common)
    assert downloaded() == {f"{task['name']}.jsonl" for task in listed[:3]}
    assert all((output / name).stat().st_mtime_ns == time for name, time in kept.items())
    # A damaged file is fetched again; a task that left the list leaves the directory.
    damaged = output / f"{listed[1]['name']}.jsonl"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-5])
    tasks_file.write_text(yaml.safe_dump({"tasks": listed[1:3]}))
    run("download_smallbench.py", *common)
    assert damaged.read_bytes() == before
    assert downloaded() == {f"{task['name']}.jsonl" for task in listed[1:3]}
    assert json.loads((output / "source.json").read_bytes())["tasks"].keys() == {
        task["name"] for task in listed[1:3]
    }
    tasks_file.write_text(yaml.safe_dump({"tasks": listed[1:2]}))
    assert "0 tasks from" in run("download_smallbench.py", *common)
    assert downloaded() == {damaged.name}
    assert "nothing to do" in run("download_smallbench.py", *common)


def test_smallbench_default_list_is_found_from_any_directory(tmp_path: Path, mirror: Path) -> None:
    message = refused("download_smallbench.py", "--output", "x", "--mirror", mirror, cwd=tmp_path)
    assert "nyu-mll/blimp" in message and "no configuration" in message
    assert not list((tmp_path / "x").glob("*.json*"))


def test_bad_task_lists_are_refused_by_task_and_key(tmp_path: Path, mirror: Path) -> None:
    good = {
        **{"name": "a", "path": "nyu-mll/glue", "config": "sst2", "split": "validation"},
        **{"prompt": "", "choices": ["x", "y"], "gold": "0"},
    }
    cases: list[tuple[Any, str]] = [
        ({"tasks": [good, {**good, "name": "b", "config": 3}]}, "task 2 (b): config"),
        ({"tasks": [{k: v for k, v in good.items() if k != "split"}]}, "task 1 (a): split"),
        ({"tasks": [{**good, "name": "../a"}]}, "task 1 (../a): name"),
        ({"tasks": [{**good, "path": ""}]}, "task 1 (a): path"),
        ({"tasks": [{**good, "gold": "{{ oops"}]}, "task a: a template"),
        ({"tasks": [good, good]}, "'a'"),
        ({"tasks": []}, "tasks"),
        ([good], "tasks"),
    ]
    for content, expected in cases:
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content))
        arguments = ("--output", tmp_path / "x", "--tasks", tmp_path / "tasks.yaml")
        assert expected in refused("download_smallbench.py", *arguments, "--mirror", mirror)
    (tmp_path / "tasks.yaml").write_text("tasks: [")
    assert "YAML" in refused("download_smallbench.py", *arguments, "--mirror", mirror)
    assert not (tmp_path / "x").exists()


# Arguments


@pytest.mark.parametrize(
    "script",
    [
        "download_wikitext.py",
        "preprocess_lm.py",
        "download_smallbench.py",
        "make_corpus.py",
        "check_leakage.py",
    ],
)
def test_arguments(tmp_path: Path, script: str) -> None:
    printed = run(script, "--help")
    assert f"python scripts/{script}" in printed
    assert "required" in refused(script)
    # A file where a directory belongs is the user's mistake as well.
    (tmp_path / "file").write_text("")
    corpus = small_corpus(tmp_path / "corpus")
    also = {
        "preprocess_lm.py": ("--input", corpus, "--vocab_size", 300),
        "check_leakage.py": ("--corpus", corpus, "--smallbench", tmp_path / "file"),
        "download_smallbench.py": ("--mirror", tmp_path),
    }
    arguments = ("--output", tmp_path / "file", *also.get(script, ()))
    assert str(tmp_path / "file") in refused(script, *arguments)
    assert "--no_such" in refused(script, *arguments, "--no_such")
