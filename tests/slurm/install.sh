#!/usr/bin/env bash
# Makes a Debian machine ready for the tests of this folder: Slurm, munge, ssh, iproute2, Chromium.
# No service is started. Exit status 77 where they cannot run, after a line "skipped: reason".
# --check only says whether they can run here, and installs nothing.
set -euo pipefail

skip() {
  echo "skipped: $*"
  exit 77
}

missing() {
  local program
  for program in slurmctld slurmd sbatch munged sshd ssh ssh-keygen ip nsenter unshare setpriv; do
    command -v "$program" > /dev/null || echo "$program"
  done
}

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$@" > /dev/null
}

PATH=$PATH:/usr/sbin:/sbin
[ "$(uname)" = Linux ] || skip "the cluster tests need Linux, this is $(uname)"
[ "$(id -u)" = 0 ] || skip "the cluster tests make network namespaces, which needs root"

if [ -n "$(missing)" ]; then
  [ "${1-}" != --check ] || skip "no $(missing | paste -sd ' '); tests/slurm/install.sh installs it"
  command -v apt-get > /dev/null || skip "no $(missing | paste -sd ' '), and no apt-get to install it"
  # Debian's way to say that a package shall not start its service.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
  fi
  apt-get update -qq
  apt_install slurm-wlm munge iproute2 openssh-server openssh-client util-linux
fi
# One test wants it, and skips itself where there is no such package (Ubuntu).
if [ "${1-}" != --check ] && ! command -v chromium-headless-shell > /dev/null; then
  apt-get update -qq && apt_install chromium-headless-shell ||
    echo "chromium-headless-shell cannot be installed: no test of the report in a browser"
fi

problem=$(unshare --net --uts --mount --pid --fork --mount-proc bash -c '
  ip link add name bridge type bridge
  ip link add name one type veth peer name two
  mount -t tmpfs tmpfs /run' 2>&1) || skip "no namespaces with a bridge and mounts: $problem"
