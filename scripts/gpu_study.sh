#!/usr/bin/env bash
# Everything that needs a GPU (A100 or newer), most important first, on machines that vanish: CUDA
# tests, the step against its peers, the 10M study, the PRD's phases on english-50m. After `make
# setup-test`, with the data of configs/study_10m.yaml. A new machine needs data/ and the published
# folders, and goes on by the same command.
#   PARTS="tests bench"    of: tests bench study english (default: all)
#   LIMIT_S=540            seconds until the machine goes: studies stop in time to be published
#   OUT=folder             where the published folders are packed at the end (results.txz)
set -uo pipefail
python=${PYTHON:-python3} code=0 end=$((SECONDS + ${LIMIT_S:-864000}))
part() { [[ " ${PARTS:-tests bench study english} " == *" $1 "* ]]; }
limited() { # COMMAND...: for as long as is left, less a minute to publish; 75 where it was cut
  local left=$((end - SECONDS - 60)) ended=0
  ((left > 0)) || return 75
  timeout --signal TERM --kill-after 30 "$left" "$@" || ended=$?
  return $((ended == 124 ? 75 : ended))
}
study() { # FILE NAME [FLAGS]: carry a study on, then keep its small files
  limited "$python" run_experiment.py --study "$1" --device cuda --log_dir "logs/$2" \
    --published "results/$2" "${@:3}" || code=$?
  [[ ! -d logs/$2 ]] || "$python" scripts/publish_results.py --log_dir "logs/$2" \
    --output "results/$2" || code=$?
}
part tests && { TEST_DEVICE=cuda limited "$python" -m pytest -q tests/test_cuda.py || code=$?; }
part bench && { limited "$python" -m benchmarks.throughput --device cuda --batch_size 256 \
  --micro_batches 256 --steps 50 || code=$?; }
part study && study configs/study_10m.yaml study-10m-gpu --set training.threads=null \
  training.micro_batch=64 training.loss_chunk=8192 training.compile=auto
part english && study configs/english_study.yaml study-gpu
[[ -z ${OUT:-} ]] || tar -cJf "$OUT/results.txz" results/study*-gpu results/benchmarks
exit $code
