#!/bin/bash
# A parquet file with a column of Arrow's type map, in `datasets` 5.2.0.
#
# `load_dataset("parquet", ..., columns=["text"])` promises to ignore the other columns, yet a map
# column among them makes the load fail: the features of the whole file are built before the columns
# are chosen. pyarrow reads the same column of the same file.
#
# Seen on Linux, Python 3.11:
#   ValueError: Arrow type map<string, int64 ('tags')> does not have a datasets dtype equivalent.
#
# What follows for a user: read such files with pyarrow.parquet.
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$place"
HF_HUB_OFFLINE=1 HF_HOME="$place/home" venv/bin/python - <<'PYTHON'
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

datasets.disable_progress_bars()
tags = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
pq.write_table(pa.table({"text": ["hello"], "tags": tags}), "map.parquet")
assert pq.read_table("map.parquet", columns=["text"]).to_pylist() == [{"text": "hello"}]
try:
    read = datasets.load_dataset("parquet", data_files="map.parquet", columns=["text"])
except ValueError as error:
    print(error)
    sys.exit("does not have a datasets dtype equivalent" not in str(error))
print(read)
sys.exit(1)
PYTHON
