#!/bin/sh
# GitLab Runner, custom executor, prepare_exec: starts the machine of this job from a snapshot.
# Arguments: the directory of the snapshots, the longest life of a machine, further options of `vmrun restore`.
set -eu

snapshots=$1
longest=$2
shift 2
image=${CUSTOM_ENV_CI_JOB_IMAGE:-default}

fail() {
    echo "vmrun: $*" >&2
    exit "${SYSTEM_FAILURE_EXIT_CODE:-1}"
}

# The image is a name in the job's file: it must not lead out of the directory.
case $image in
    '' | .* | *[!A-Za-z0-9._-]*) fail "image: give the name of a snapshot, of letters, digits and . _ -" ;;
esac
[ -e "$snapshots/$image/manifest.json" ] || fail "image: $image: there is no such snapshot on this runner"

# The time limit ends the machine even if nobody comes back for it.
vmrun restore --detach --throw-away --name "$VMRUN_MACHINE" --timeout "$longest" "$@" "$snapshots/$image" ||
    fail "the machine could not be started"
