#!/bin/sh
# GitLab Runner, custom executor, cleanup_exec: ends the machine of this job. It runs after failures too, when there may be
# no machine.
set -eu

[ -n "${VMRUN_MACHINE:-}" ] || exit 0
vmrun inspect "$VMRUN_MACHINE" >/dev/null 2>&1 || exit 0
vmrun stop --force --wait "$VMRUN_MACHINE"
