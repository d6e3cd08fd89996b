#!/bin/bash
# pytest 9.2.0's `monkeypatch.setattr` on a setting of torch 2.13.0 takes the setting away for good.
#
# The modules `torch._dynamo.config`, `torch._inductor.config` and their like answer for settings
# that do not stand in their `__dict__`. From 9.2.0 on, undoing a patch restores the entry of that
# dictionary, and where there was none deletes the attribute; torch takes the deletion as an order to
# hide the setting. The test that patched passes. Every later one that reads it (each compilation
# reads recompile_limit) ends in AttributeError: "torch._dynamo.config.recompile_limit does not
# exist". pytest 9.1.0 puts the old value back.
#
# What follows for a user: `with torch._dynamo.config.patch(recompile_limit=2):` in tests.
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/test_settings.py" <<'PYTHON'
import torch

before = torch._dynamo.config.recompile_limit


def test_that_sets(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    assert torch._dynamo.config.recompile_limit == 2


def test_that_reads():
    assert torch._dynamo.config.recompile_limit == before
PYTHON
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy
for version in 9.1.0 9.2.0; do
  "$place/venv/bin/pip" install --quiet "pytest==$version"
  said=$(cd "$place" && venv/bin/python -m pytest -q -p no:cacheprovider test_settings.py 2>&1 || true)
  echo "$version: $(tail -1 <<< "$said")"
  case "$version" in
    9.1.0) grep -q "2 passed" <<< "$said" ;;
    9.2.0) grep -q "1 failed, 1 passed" <<< "$said" &&
      grep -q "recompile_limit does not exist" <<< "$said" ;;
  esac || { echo "other than described"; exit 1; }
done
echo "as described"
