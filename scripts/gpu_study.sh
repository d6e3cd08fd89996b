#!/usr/bin/env bash
# Everything that needs a GPU, most important first, on machines that vanish: CUDA tests, the step
# against its peers, the 10M study, the PRD's phases on english-50m. Published after each part; a
# new machine needs data/ and the published folders, and goes on by the same command.
set -uo pipefail
python=${PYTHON:-python3} code=0
study() { # FILE NAME [FLAGS]: carry a study on, then keep its small files
  "$python" run_experiment.py --study "$1" --device cuda --log_dir "logs/$2" "${@:3}" || code=$?
  "$python" scripts/publish_results.py --log_dir "logs/$2" --output "results/$2" || code=$?
}
TEST_DEVICE=cuda "$python" -m pytest -q tests/test_cuda.py || code=$?
"$python" -m benchmarks.throughput --device cuda || code=$?
study configs/study_10m.yaml study-10m-gpu --published results/study-10m-gpu --set \
  training.threads=null training.micro_batch=null training.loss_chunk=null training.compile=auto
study configs/english_study.yaml study-gpu --published results/study-gpu
exit $code
