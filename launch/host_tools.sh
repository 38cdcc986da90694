# Sourced by test.sh --hosts: what tests/engine/test_two_hosts.py needs beside Python, and the compiler and emulator with which
# tests/kernels/test_cpp_program.py runs the CPU kernels on Arm. Installed where that is possible without asking (root, apt-get,
# and namespaces to use it in); elsewhere those tests are skipped, with their reasons.

missing=()
command -v ip > /dev/null || missing+=(iproute2)
[ -x "$(PATH="$PATH:/usr/sbin" command -v sshd)" ] || missing+=(openssh-server)
command -v ssh-keygen > /dev/null || missing+=(openssh-client)
command -v pdsh > /dev/null || missing+=(pdsh)
command -v aarch64-linux-gnu-g++ > /dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 > /dev/null || missing+=(qemu-user)

apt_install() {
  local apt=(timeout 300 apt-get -qq -o DPkg::Lock::Timeout=60)
  export DEBIAN_FRONTEND=noninteractive
  "${apt[@]}" install --yes --no-install-recommends "$@" ||
    { "${apt[@]}" update && "${apt[@]}" install --yes --no-install-recommends "$@"; }
}

install_without_starting() {
  # a daemon that is installed for a test must not start on this machine
  local policy=/usr/sbin/policy-rc.d status=0
  [ ! -e "$policy" ] || { apt_install "$@"; return; }
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
  apt_install "$@" || status=$?
  rm -f "$policy"
  return "$status"
}

if [ "${#missing[@]}" -gt 0 ] && [ "${LARGEBATCH_TEST_HOST_TOOLS:-1}" != 0 ] && [ "$(id -u)" -eq 0 ] &&
  command -v apt-get > /dev/null && unshare --mount --net --uts --pid --fork --mount-proc true 2> /dev/null; then
  echo "installing ${missing[*]} for the tests with two hosts and on Arm (LARGEBATCH_TEST_HOST_TOOLS=0: don't, and skip them)" >&2
  install_without_starting "${missing[@]}" > .venv/host-tools.log 2>&1 ||
    echo "apt-get could not (see .venv/host-tools.log); those tests will be skipped" >&2
fi
