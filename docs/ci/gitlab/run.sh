#!/bin/sh
# GitLab Runner, custom executor, run_exec: runs one stage of the job in its machine.
# Arguments: the shell, then what the runner adds: the stage's script and the stage's name.
#
# Every stage runs in the guest, fetching the sources too: a job says with hooks what else is done there.
set -eu

shell=$1
script=$2
stage=$3

vmrun cp "$script" "$VMRUN_MACHINE:/tmp/gitlab-stage" || {
    echo "vmrun: $stage: the script could not be brought into the machine" >&2
    exit "${SYSTEM_FAILURE_EXIT_CODE:-1}"
}
code=0
vmrun exec "$VMRUN_MACHINE" -- "$shell" /tmp/gitlab-stage </dev/null || code=$?
[ "$code" -ne 0 ] || exit 0

if vmrun inspect "$VMRUN_MACHINE" >/dev/null 2>&1; then
    # Newer runners read the job's own code from there.
    [ -z "${BUILD_EXIT_CODE_FILE:-}" ] || echo "$code" >"$BUILD_EXIT_CODE_FILE"
    exit "${BUILD_FAILURE_EXIT_CODE:-1}"
fi
echo "vmrun: $stage: the machine has ended; its console said last:" >&2
vmrun log "$VMRUN_MACHINE" | tail -n 20 | LC_ALL=C tr -cd '\11\12\40-\176' >&2
exit "${SYSTEM_FAILURE_EXIT_CODE:-1}"
