"""A tiny mirror of the hub's layout, so that tests of the data scripts need no network."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from src.data.tasks import TASKS_FILE

TEXT_DATASET = "tiny/prose"
ARTICLES = {"train": 40, "validation": 6, "test": 6}

Rows = Sequence[Mapping[str, Any]]


def build_tiny_mirror(root: Path, *, seed: int = 0) -> Path:
    """Write the mirror under `root` (created) and return it, to be used as HUB_MIRROR.

    Salesforce/wikitext has the fault of real mirrors: wikitext-2-v1 is complete, the raw
    configuration lacks its train split. `tiny/prose` is a text dataset of whole documents, its
    train split in two files. Five SmallBench tasks: one blimp paradigm (anaphor_gender_agreement),
    glue sst2 and rte, arc_easy (nested fields), smallbench/subj. Everything depends on `seed` only.
    """
    rng = random.Random(seed)
    lexicon = _lexicon(rng, 700)
    wikitext = {split: _wikitext(rng, lexicon, n) for split, n in ARTICLES.items()}
    held_out = {split: rows for split, rows in wikitext.items() if split != "train"}
    _write_dataset(
        root / "Salesforce" / "wikitext", {"wikitext-2-v1": wikitext, "wikitext-2-raw-v1": held_out}
    )
    prose = {split: _prose(rng, lexicon, n) for split, n in ARTICLES.items()}
    _write_dataset(root / TEXT_DATASET, {"default": prose}, shards=2)
    _write_smallbench(root, rng, lexicon)
    return root


def write_tiny_tasks(path: Path) -> Path:
    """Write the entries of configs/smallbench.yaml whose rows the tiny mirror has to `path`."""
    names = {"blimp_anaphor_gender_agreement", "sst2", "rte", "arc_easy", "subj"}
    contents = yaml.safe_load(TASKS_FILE.read_text(encoding="utf-8"))
    tasks = [task for task in contents["tasks"] if task["name"] in names]
    assert {task["name"] for task in tasks} == names
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"seed": 0, "tasks": tasks}), encoding="utf-8")
    return path


def _lexicon(rng: random.Random, size: int) -> list[str]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "an", "er")]
    words: dict[str, None] = {}
    while len(words) < size:
        words["".join(rng.choices(syllables, k=rng.randint(1, 4)))] = None
    return list(words)


def _sentence(rng: random.Random, lexicon: Sequence[str], words: int) -> str:
    # Zipf-like: a few words are frequent, as in prose
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]
    return " ".join(rng.choices(lexicon, weights, k=words))


def _wikitext(rng: random.Random, lexicon: Sequence[str], articles: int) -> Rows:
    """Lines as on the hub: a row a line, '' for a blank one, headings marked by equal signs."""
    lines = [""]
    for _ in range(articles):
        lines += [f" = {_sentence(rng, lexicon, 2).title()} = \n", ""]
        for section in range(3):
            if section:
                lines += ["", f" = = {_sentence(rng, lexicon, 2)} = = \n", ""]
            lines += [f" {_sentence(rng, lexicon, 60)} <unk> – @-@ . \n" for _ in range(3)]
        lines += [" = 1 henry and capacitance C = \n", " 1 farad . \n", ""]  # a false heading
    return [{"text": line} for line in lines]


def _prose(rng: random.Random, lexicon: Sequence[str], documents: int) -> Rows:
    return [
        {
            "text": f"Café {_sentence(rng, lexicon, 2)}\n\n{_sentence(rng, lexicon, 150)}.\n",
            "number": i,
        }
        for i in range(documents)
    ]


def _write_smallbench(root: Path, rng: random.Random, lexicon: Sequence[str]) -> None:
    def text(words: int) -> str:
        return _sentence(rng, lexicon, words)

    blimp = []
    for pair in range(40):
        start = text(6)
        blimp.append(
            {
                "sentence_good": f"{start} herself.",
                "sentence_bad": f"{start} himself.",
                "field": "morphology",
                "UID": "anaphor_gender_agreement",
                "pair_id": pair,
            }
        )
    _write_dataset(root / "nyu-mll" / "blimp", {"anaphor_gender_agreement": {"train": blimp}})
    sst2 = [{"sentence": text(9) + " ", "label": i % 2, "idx": i} for i in range(30)]
    rte = [
        {"sentence1": text(30), "sentence2": text(8) + ".", "label": i % 2, "idx": i}
        for i in range(30)
    ]
    _write_dataset(
        root / "nyu-mll" / "glue", {"sst2": {"validation": sst2}, "rte": {"validation": rte}}
    )
    arc = [
        {
            "id": f"item_{i}",
            "question": text(12) + "?",
            "choices": {"text": [text(2) for _ in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(30)
    ]
    _write_dataset(root / "allenai" / "ai2_arc", {"ARC-Easy": {"test": arc}})
    subj = [{"text": text(10), "label": i % 2} for i in range(40)]
    _write_dataset(root / "smallbench" / "subj", {"default": {"test": subj}})


def _write_dataset(
    folder: Path, configs: Mapping[str, Mapping[str, Rows]], shards: int = 1
) -> None:
    """Parquet files and a README whose header lists them, as the hub keeps a dataset."""
    header = []
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        files = []
        for split, rows in splits.items():
            count = shards if split == "train" else 1
            size = -(-len(rows) // count)
            for shard in range(count):
                table = pa.Table.from_pylist(list(rows[shard * size : (shard + 1) * size]))
                name = f"{split}-{shard:05d}-of-{count:05d}.parquet"
                pq.write_table(table, folder / config / name)
            files.append({"split": split, "path": f"{config}/{split}-*"})
        header.append({"config_name": config, "data_files": files})
    front_matter = yaml.safe_dump({"license": "cc0-1.0", "configs": header}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{front_matter}---\n\n# Generated for tests\n")
