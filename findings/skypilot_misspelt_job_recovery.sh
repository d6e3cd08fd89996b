#!/bin/bash
# SkyPilot 0.14.1 refuses an unknown key at the top of a task and under `resources`, and accepts any
# key under `resources: job_recovery`. A misspelt `recover_on_exit_codes` is therefore read without
# a word, and a managed job that exits with that code is not recovered.
#
# Seen: `resources: {use_sopt: true}` is refused; `job_recovery: {recover_on_exit_code: [75]}` (no s)
# and `{max_restart_on_errors: 3}` give a task, with the misspelt key kept in its job_recovery.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
export HOME="$place"
python3 -m venv venv
venv/bin/pip install -q skypilot==0.14.1
cat > check.py <<'PYTHON'
import sys

import sky


def accepted(resources):
    try:
        task = sky.Task.from_yaml_config({"run": "true", "resources": resources})
    except ValueError:
        return None
    (found,) = task.resources
    return found.job_recovery


ok = accepted({"use_spot": True, "job_recovery": {"recover_on_exit_codes": [75]}})
codes = accepted({"use_spot": True, "job_recovery": {"recover_on_exit_code": [75]}})
errors = accepted({"use_spot": True, "job_recovery": {"max_restart_on_errors": 3}})
resource = accepted({"use_sopt": True})
print(ok, codes, errors, resource, sep="\n")
sys.exit(
    not (
        ok is not None
        and "recover_on_exit_codes" in ok
        and codes is not None
        and "recover_on_exit_code" in codes
        and errors is not None
        and "max_restart_on_errors" in errors
        and resource is None
    )
)
PYTHON
venv/bin/python check.py && echo "as described" || { echo "other than described"; exit 1; }
