# A parameterized Nomad job: each dispatch is one command in a machine.
#
#     nomad job run vmrun.nomad.hcl
#     nomad job dispatch -meta image=/srv/images/debian.tar -meta command='make check' vmrun src.tar
#
# The payload, up to 16 KiB, is a tar file that the command finds as /payload.tar. Larger inputs come from the host.
# Needs: the raw_exec driver, vmrun in /opt/vmrun, a user vmrun in the group kvm, the guest kit built for that user.

job "vmrun" {
  type        = "batch"
  datacenters = ["*"]

  parameterized {
    payload       = "required"
    meta_required = ["command"]
    meta_optional = ["image"]
  }

  meta {
    image = "kit"
  }

  # Hosts say so themselves: `client { meta { kvm = "1" } }`.
  constraint {
    attribute = "${meta.kvm}"
    value     = "1"
  }

  group "run" {
    # A failed command is an answer; only the scheduler's own failures are for another try.
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "command" {
      # Not `exec`: its chroot has neither /dev/kvm nor the cache. vmrun's own sandbox is around the guest.
      driver = "raw_exec"
      user   = "vmrun"

      config {
        command = "/opt/vmrun/bin/vmrun"
        args = [
          "run", "--image", "${NOMAD_META_image}", "--mem", "1G", "--timeout", "30m", "--json",
          "--copy-in", "local/payload.tar:/payload.tar",
          "--", "sh", "-c", "${NOMAD_META_command}",
        ]
      }

      env {
        # One cache for all jobs of this host: kit, images, templates.
        VMRUN_CACHE   = "/var/lib/vmrun/cache"
        VMRUN_RUNTIME = "/var/lib/vmrun/run"
      }

      dispatch_payload {
        file = "payload.tar"
      }

      # SIGTERM goes to the command in the guest, which has ten seconds.
      kill_signal  = "SIGTERM"
      kill_timeout = "20s"

      resources {
        cpu    = 1000
        memory = 1400 # of the guest, and some 150 MiB for vmrun and its workers; the rest is page cache
      }
    }
  }
}
