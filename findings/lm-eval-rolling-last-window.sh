#!/bin/bash
# The windows of `loglikelihood_rolling` in lm-evaluation-harness 0.4.13 (wikitext and other
# perplexity tasks), for a text longer than the model's context.
#
# With the default context_len of 1 every token is predicted once and windows follow each other end
# to end, each token of a new window with nothing before it but the one token that it starts from.
# The last window is an exception: it is moved back until it is full, and only its last tokens count.
# They have up to a whole context before them. So the score is neither that of windows laid end to
# end nor that of strided windows: it lies between them, nearer to the latter the shorter the text.
#
# Seen: 10 tokens, context 4 gives windows that predict 4, 4 and 2 tokens; the inputs of the last are
# 4 tokens, of which 2 are the context. End to end it would read 2.
#
# What follows for a user: compare such a perplexity only with one whose windows are laid alike; a
# text that fits into the context has the same score by every method.
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet lm_eval==0.4.13
cd "$place"
HF_HUB_OFFLINE=1 HF_HOME="$place/home" venv/bin/python - <<'PYTHON'
import sys

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

tokens = list(range(1, 11))
windows = [
    make_disjoint_window(pair)
    for pair in get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=4, context_len=1)
]
for context, predicted in windows:
    print("context", context, "predicted", predicted)
read = [len(context) + len(predicted) - 1 for context, predicted in windows]
ok = (
    [token for _, predicted in windows for token in predicted] == tokens
    and [len(predicted) for _, predicted in windows] == [4, 4, 2]
    and read == [4, 4, 4]
)
print("as described" if ok else "other than described")
sys.exit(not ok)
PYTHON
