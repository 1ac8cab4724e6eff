#!/bin/sh
# GitLab Runner, custom executor, config_exec: how the machine of this job is called.
#
# The name is made up here and handed on in job_env. Whatever comes as CUSTOM_ENV_* (the job's number too) may have been
# set by the job, which could name another job's machine.
set -eu

random=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
version=$(vmrun --version)
cat <<JSON
{
  "driver": {"name": "vmrun", "version": "${version#vmrun }"},
  "builds_dir_is_shared": false,
  "job_env": {"VMRUN_MACHINE": "gitlab-$random"}
}
JSON
