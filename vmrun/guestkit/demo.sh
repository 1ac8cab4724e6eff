#!/bin/sh
# The main job of the demo, run by init in place of a shell. Ends with status 0 when all of it worked.
# vmrun.fetch=URL on the kernel command line names a page on the host; the server may take its time to answer,
# and the guest answers pings meanwhile.
set -e
say() { echo "demo: $*"; }

say "kernel $(uname -sr), $(nproc) CPU(s)"
while read -r device where type options rest; do
    [ "$where" = / ] && [ "$device" != rootfs ] && say "root is $device ($type, ${options%%,*})"
done </proc/mounts
[ -w / ]
url=
for word in $(cat /proc/cmdline); do
    case $word in vmrun.fetch=*) url=${word#vmrun.fetch=} ;; esac
done
echo "written by the guest, $(uname -r)" >/root/hello
say "wrote /root/hello"
if [ -n "$url" ]; then
    say "network $(ip -4 -o address show dev eth0 | awk '{print $4}'), ready for pings"
    # Debian 12's busybox wget crashes at its own -T.
    timeout 60 wget -q -O /root/page "$url"
    say "fetched $url: $(head -n 1 /root/page)"
fi
sync
say "done, powering off"
