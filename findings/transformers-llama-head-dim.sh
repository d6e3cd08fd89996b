#!/bin/bash
# A Llama whose hidden size the number of heads does not divide, in `transformers` 5.23.0 and 4.57.6.
#
# LlamaConfig has `head_dim`, so that the width of attention need not be the hidden size, and 4.57.6
# builds and runs hidden_size 24 with 5 heads of 16. In 5.23.0 the configuration alone is refused:
# the hidden size has to be a multiple of the number of heads, whatever head_dim says. A checkpoint
# of 4.57 with such a shape therefore no longer loads. MistralConfig with the same numbers and
# `sliding_window: null` is accepted by both, as is Qwen3Config.
#
# What follows for a user: write such a Llama without biases as a Mistral; the weights have the same
# names and compute the same.
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/check.py" <<'PYTHON'
import logging
import sys

from transformers import LlamaConfig, MistralConfig, Qwen3Config

logging.disable(logging.CRITICAL)


def accepted(kind, **more):
    shape = {"hidden_size": 24, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16}
    try:
        return kind(**shape, **more).head_dim == 16
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[-1].strip()}"


found = [accepted(LlamaConfig), accepted(MistralConfig, sliding_window=None), accepted(Qwen3Config)]
print(found)
refused = isinstance(found[0], str) and "multiple" in found[0]
sys.exit(not (found[1:] == [True, True] and refused == (sys.argv[1] == "5.23.0")
              and (refused or found[0] is True)))
PYTHON
for version in 5.23.0 4.57.6; do
  python3 -m venv "$place/$version"
  "$place/$version/bin/pip" install --quiet "transformers==$version"
  (cd "$place" && HF_HUB_OFFLINE=1 HF_HOME="$place/home" "$version/bin/python" check.py "$version") ||
    { echo "other than described"; exit 1; }
done
echo "as described"
