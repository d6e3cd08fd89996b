#!/bin/bash
# Text that spells a special token, in `tokenizers` 0.23.3 and `transformers` 5.23.0.
#
# With `encode_special_tokens = True` a tokenizer reads the text "<|end|>" as text; by default it
# becomes the special token. The setting is an attribute of the object alone: `save` does not write
# it, so the same file loaded again has it off. Wrapped by transformers it is lost sooner: an
# ordinary call sets the backend's attribute to the wrapper's `split_special_tokens`, which is off
# unless tokenizer_config.json or the caller says otherwise.
#
# Seen on Linux, Python 3.11:
#   set to True:                     [0] not among the ids
#   saved and loaded:                False, [0] among the ids
#   wrapped, before a call:          True;  after it: False, [0] among the ids
#   wrapped, split_special_tokens:   True;  after it: True,  [0] not among the ids
#
# What follows for a user: set it after each load, and write "split_special_tokens": true into
# tokenizer_config.json for those who load it with AutoTokenizer.
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet tokenizers==0.23.3 transformers==5.23.0
cd "$place"
HF_HUB_OFFLINE=1 HF_HOME="$place/home" venv/bin/python - <<'PYTHON'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "a <|end|> b"
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
trainer = trainers.BpeTrainer(
    vocab_size=257,
    special_tokens=["<|end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
tokenizer.train_from_iterator([], trainer)
tokenizer.encode_special_tokens = True
found = [0 in tokenizer.encode(TEXT).ids]

tokenizer.save("tokenizer.json")
again = Tokenizer.from_file("tokenizer.json")
found += [again.encode_special_tokens, 0 in again.encode(TEXT).ids]


def wrapped(**settings):
    wrapper = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **settings)
    wrapper.backend_tokenizer.encode_special_tokens = True
    ids = wrapper(TEXT).input_ids
    return [wrapper.backend_tokenizer.encode_special_tokens, 0 in ids]


found += wrapped() + wrapped(split_special_tokens=True)
print(found)
sys.exit(found != [False, False, True, False, True, True, False])
PYTHON
