#!/usr/bin/env bash
# Everything that needs a GPU, most important first, on machines that vanish:
#
#     bash scripts/gpu_study.sh [STAGE ...]        # default: all of them, in this order
#
#   tests   the CUDA tests
#   bench   training step against its peers, compilation, scaling
#   shares  the three embedding shares, full budget, one seed, baseline first
#   study   the whole study of $STUDY (ranking, GLU, phase 1b, finalists' seeds); adopts `shares`
#   seeds   seeds 1 and 2 of the three shares
#   arms    frontier, factorised table, fixed depth; one seed
#
# After each stage its results are packed into $OUT/<stage>.tar.gz: every run's small files, the CSV,
# the figures; no checkpoints. A stage that fails or runs out of time is packed as far as it came
# and the next one starts. To go on elsewhere put the packs into $OUT and start the script again:
# they are unpacked first, and a finished run is a no-op. Exit code: the first stage's that failed.
#
#   DEVICE=cuda   or cpu, to rehearse          LIMIT=540  seconds a stage (0: none)
#   OUT=gpu       packs                        LOGS=logs/gpu  run directories
#   STUDY=configs/english_study.yaml           CONFIGS=configs  the sweeps of shares and arms
#   SET="section.key=value ..."  changes to every run; by default the corpus that the study names
#   PYTHON=python3
set -uo pipefail
DEVICE=${DEVICE:-cuda} OUT=${OUT:-gpu} LOGS=${LOGS:-logs/gpu} CONFIGS=${CONFIGS:-configs}
STUDY=${STUDY:-$CONFIGS/english_study.yaml} LIMIT=${LIMIT:-540} PYTHON=${PYTHON:-python3}
SET=${SET:-data.dir=data/english_tokenized evaluation.outside_dir=data/wikitext-2-raw}
mkdir -p "$OUT" "$LOGS"
sets=()
for change in $SET; do sets+=(--set "$change"); done

within() {
  if [ "$LIMIT" -gt 0 ]; then timeout -k 30 "$LIMIT" "$@"; else "$@"; fi
}

run() { # CONFIG EXPERIMENT... [-- FLAGS]: one process a sweep, so that shapes are compiled once
  local config=$1
  shift
  within "$PYTHON" run_experiment.py --config "$CONFIGS/$config" --exp "$@" --device "$DEVICE" \
    --log_dir "$LOGS" ${sets[@]+"${sets[@]}"}
}

pack() {
  "$PYTHON" scripts/aggregate_results.py --log_dir "$LOGS" --output "$OUT/results_summary.csv" || true
  local files="$OUT/.files"
  find "$LOGS" \( -name checkpoints -o -name final -o -name tensorboard \) -prune -o -type f -print > "$files"
  local places=("$OUT")
  if [ -d results/benchmarks ]; then places+=(results/benchmarks); fi
  find "${places[@]}" -maxdepth 1 -type f \
    \( -name '*.json' -o -name '*.md' -o -name '*.csv' -o -name '*.png' -o -name '*.log' \) >> "$files"
  tar -czf "$OUT/.partial" -T "$files" && mv "$OUT/.partial" "$OUT/$1.tar.gz"
  rm -f "$files"
  ls -l "$OUT/$1.tar.gz"
}

stage_tests() { TEST_DEVICE=$DEVICE within "$PYTHON" -m pytest -q tests/test_cuda.py; }

stage_bench() {
  local code=0
  within "$PYTHON" -m benchmarks.throughput --device "$DEVICE" ${BENCH:-} || code=$?
  within "$PYTHON" -m benchmarks.compile_cost --device "$DEVICE" || code=$?
  within "$PYTHON" -m benchmarks.scaling --device "$DEVICE" || code=$?
  return $code
}

stage_shares() { run embed_ratio.yaml all; }

stage_study() {
  local file="$LOGS/study.yaml"
  "$PYTHON" - "$STUDY" "$file" "$LOGS" "$DEVICE" $SET << 'PROGRAM' || return 70
import pathlib, sys
import yaml
stated, made, logs, device, *changes = sys.argv[1:]
study = yaml.safe_load(pathlib.Path(stated).read_text())
study |= {"log_dir": logs, "device": device}
study["overrides"] = [*study.get("overrides", []), *changes]
pathlib.Path(made).write_text(yaml.safe_dump(study, sort_keys=False))
PROGRAM
  within "$PYTHON" run_experiment.py --study "$file"
}

stage_seeds() { run embed_ratio.yaml all --seed 1 2; }

stage_arms() {
  local code=0
  for config in frontier factorised depth_control; do run "$config.yaml" all || code=$?; done
  return $code
}

for packed in "$OUT"/*.tar.gz; do
  if [ -f "$packed" ]; then tar -xzf "$packed" --skip-old-files; fi
done
stages=("$@")
if [ $# -eq 0 ]; then stages=(tests bench shares study seeds arms); fi
failed=0
for stage in "${stages[@]}"; do
  if ! declare -F "stage_$stage" > /dev/null; then
    echo "gpu_study: found the stage '$stage', expected tests, bench, shares, study, seeds or arms" >&2
    exit 78
  fi
done
for stage in "${stages[@]}"; do
  echo "=== $stage, $(date -u +%H:%M:%S)"
  "stage_$stage" 2>&1 | tee -a "$OUT/$stage.log"
  code=${PIPESTATUS[0]}
  echo "=== $stage: exit $code"
  pack "$stage"
  if [ "$failed" -eq 0 ]; then failed=$code; fi
done
exit "$failed"
