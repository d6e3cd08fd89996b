#!/usr/bin/env bash
# The study at 10M parameters on CPU cores, block by block; every block goes on where it was cut:
#
#     bash scripts/cpu_study.sh [BLOCK ...]        # default: prd rates seeds
#
#   prd    the PRD's ranking runs: three shares, 256 x 128 tokens a step, rate 4e-3, 5M tokens
#   rates  the three shares at 64 x 128 and each rate of $RATES
#   seeds  seeds 1 and 2 of the same, at the rates of $OWN (experiment:rate ...)
#
# One run a core with one thread each ($JOBS runs at a time), the same for all that is compared. The
# kill rule is recorded and stops nothing. Ranking runs measure perplexity on at most 150,000 tokens
# a split and no SmallBench: finalists get the whole of both. Corpus: the README's english-50m.
#
#   LOGS=logs/cpu   run directories      JOBS=2      PYTHON=python3
#   RATES=2e-3,4e-3,8e-3                 OWN="emb35:4e-3 emb25:4e-3 emb45:4e-3"
set -uo pipefail
LOGS=${LOGS:-logs/cpu} JOBS=${JOBS:-2} PYTHON=${PYTHON:-python3}
RATES=${RATES:-2e-3,4e-3,8e-3} OWN=${OWN:-emb35:4e-3 emb25:4e-3 emb45:4e-3}

run() { # LOG_DIR EXPERIMENT... [-- FLAGS]
  local logs=$1 names=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do names+=("$1") && shift; done
  "$PYTHON" -m src.study.engines --engine local --jobs "$JOBS" --device cpu \
    --config configs/embed_ratio.yaml --exp "${names[@]}" --phase rank --log_dir "$LOGS/$logs" \
    --set data.dir=data/english_tokenized --set evaluation.outside_dir=data/wikitext-2-raw \
    --set evaluation.metrics=[perplexity] --set evaluation.perplexity_tokens=150_000 \
    --set kill_rule.action=record --set training.checkpoint_minutes=5 \
    --set training.threads=1 --set training.precision=bf16 --set training.compile=on \
    --set training.micro_batch=16 --set training.loss_chunk=512 "${@:2}"
}

block_prd() { run prd all; }

block_rates() {
  local small=(--set training.ranking_batch_size=64 --set "training.learning_rate=[$RATES]")
  run rates emb35 -- "${small[@]}" && run rates emb25 emb45 -- "${small[@]}"
}

block_seeds() {
  local pair
  for pair in $OWN; do
    run rates "${pair%%:*}-lr${pair##*:}" -- --seed 1 2 \
      --set training.ranking_batch_size=64 --set "training.learning_rate=[$RATES]" || return $?
  done
}

blocks=("$@")
if [ $# -eq 0 ]; then blocks=(prd rates seeds); fi
for block in "${blocks[@]}"; do
  if ! declare -F "block_$block" > /dev/null; then
    echo "cpu_study: found the block '$block', expected prd, rates or seeds" >&2
    exit 78
  fi
done
for block in "${blocks[@]}"; do
  echo "=== $block, $(date -u +%H:%M:%S)"
  "block_$block"
  code=$?
  echo "=== $block: exit $code; to go on: bash scripts/cpu_study.sh ${blocks[*]}"
  if [ "$code" -ne 0 ]; then exit "$code"; fi
done
