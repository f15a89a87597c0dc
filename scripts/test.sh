#!/usr/bin/env bash
# The whole test suite in the same .venv as the quickstart's. Arguments go to pytest: `bash scripts/test.sh -k layers`.
# TEST_JOBS sets the number of processes (default: the cores, at most 4).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
jobs=${TEST_JOBS:-$(python -c 'import os; print(min(4, os.cpu_count() or 1))')}
# Processes that each start a thread per core slow one another down.
[ "$jobs" -le 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n "$jobs" --dist loadgroup "$@"
