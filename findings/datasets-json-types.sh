#!/bin/bash
# The types of a JSON Lines file in `datasets` 5.2.0.
#
# A column's type is settled by the first block of the file, about 10 MB. What comes later is cast
# to it without a word where Arrow can cast: after 12,000 rows of `{"id": 1}` with 1,000 characters
# beside them, the text "007" is read as the number 7; after as many rows of texts, the number 5 is
# read as the text '5'. Where Arrow cannot (2.5 among whole numbers) the load fails. A column whose
# texts all look like dates is no column of texts at all: it becomes a timestamp and its rows are
# datetime objects. One text among them that is no date, and all stay texts.
#
# Seen on Linux, Python 3.11, with the versions below:
#   text "007" after 12,000 whole numbers:  Value('int64') 7
#   number 5 after 12,000 texts:            Value('string') '5'
#   texts that look like dates:             Value('timestamp[s]') datetime.datetime(2024, 1, 2, 0, 0)
#
# What follows for a user: give `features=` where types matter, or read the parquet files.
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$place"
HF_HUB_OFFLINE=1 HF_HOME="$place/home" venv/bin/python - <<'PYTHON'
import datetime
import json
import sys

import datasets

datasets.disable_progress_bars()
FILLER = "x" * 1_000


def last(name, rows):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"filler": FILLER, **row}) + "\n" for row in rows)
    read = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")
    (column,) = set(read.column_names) - {"filler"}
    print(f"{name}: {read.features[column]} {read[-1][column]!r}")
    return read.features[column].dtype, read[-1][column]


found = [
    last("text-after-numbers", [{"id": 1}] * 12_000 + [{"id": "007"}]),
    last("number-after-texts", [{"id": "a"}] * 12_000 + [{"id": 5}]),
    last("dates", [{"text": "2023-05-06"}, {"text": "2024-01-02"}]),
]
expected = [("int64", 7), ("string", "5"), ("timestamp[s]", datetime.datetime(2024, 1, 2))]
sys.exit(found != expected)
PYTHON
