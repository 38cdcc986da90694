"""Several hosts on one machine: namespaces with an address, a name, a /run and an sshd each, joined by a virtual cable.

A host is one process tree in its own network, mount, UTS and process namespaces. Nothing of it has a name outside: when
its first process is killed, or whoever started it dies, the kernel takes processes, mounts, /dev/shm and cable away.
Needs Linux, root, util-linux, iproute2, openssh-server and pdsh; :func:`reason_against` says which is missing.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

NAMESPACES = ("--mount", "--net", "--uts", "--pid")
TOOLS = {
    "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "ip": "iproute2", "sshd": "openssh-server",
    "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh",
}  # fmt: skip
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
SECONDS = 60

SET_UP = """
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mount -t tmpfs tmpfs /dev/shm
[ ! -d ~/.ssh ] || mount -t tmpfs tmpfs ~/.ssh
mount --bind {folder}/ssh /etc/ssh
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/shadow /etc/shadow
hostname {name}
ip link set lo up
exec {sshd} -D -e
"""

SSHD_CONFIG = """
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/id_ed25519.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
MaxStartups 100
"""

SSH_CONFIG = """
Host *
    IdentityFile /etc/ssh/id_ed25519
    IdentitiesOnly yes
    GlobalKnownHostsFile /etc/ssh/known_hosts
    StrictHostKeyChecking yes
    BatchMode yes
    LogLevel ERROR
"""


class CannotMakeHostsError(RuntimeError):
    """This machine does not allow it; says why."""


def reason_against():
    """Why there can be no hosts on this machine, or None."""
    if sys.platform != "linux":
        return f"needs Linux; this is {sys.platform}"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SEARCH_PATH) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        return f"needs {', '.join(missing)}; on Debian and Ubuntu: apt-get install {packages}"
    probe = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "true"], capture_output=True, text=True
    )
    if probe.returncode != 0:
        return f"this machine gives root no namespaces ({probe.stderr.strip()})"
    return None


class Host:
    """One host, from :class:`TwoHosts`. ``pid`` is its first process, seen from outside."""

    def __init__(self, name, address, folder):
        self.name, self.address = name, address
        self.log = folder / f"{name}.sshd.log"
        script = SET_UP.format(folder=shlex.quote(str(folder)), name=name, sshd=shutil.which("sshd", path=SEARCH_PATH))
        with open(self.log, "w") as log:
            # dies with this process (setpriv), and takes its own child along (--kill-child)
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL",
                 "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private",
                 "sh", "-ec", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"PATH": SEARCH_PATH, "HOME": os.path.expanduser("~")},
                start_new_session=True,
            )  # fmt: skip
        self.wait_for(lambda: "Server listening" in self.log.read_text())
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (self.pid,) = map(int, children.read_text().split())

    def wait_for(self, condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise CannotMakeHostsError(f"host {self.name} does not come up: {self.log.read_text().strip()}")
            time.sleep(0.02)

    def command(self, *arguments, folder="/"):
        """The command line that runs ``arguments`` on this host, in ``folder``."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder), *map(str, arguments)]
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--", *inside]

    def start(self, *arguments, folder="/", env=None):
        """A process on this host whose output can be read."""
        return subprocess.Popen(
            self.command(*arguments, folder=folder), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments, folder="/", env=None, seconds=SECONDS):
        """(exit code, standard output, standard error). What is not done in time goes with the host."""
        process = self.start(*arguments, folder=folder, env=env)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.close()
            out, err = process.communicate()
            raise AssertionError(f"{arguments} on {self.name}: not done in {seconds} s\n{out}\n{err}") from None
        return process.returncode, out, err

    def close(self):
        """Ends every process of the host."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class TwoHosts:
    """``node1`` and ``node2`` under addresses that are set aside for documentation (RFC 5737), able to log in to each other.

    ``folder`` gets keys, logs and the hostfile. Use as a context manager, or call :meth:`close`.
    """

    interface = "eth0"

    def __init__(self, folder, num_slots=1):
        self.folder = pathlib.Path(folder)
        self.hosts = []
        addresses = {"node1": "192.0.2.1", "node2": "192.0.2.2"}
        self.hostfile = self.folder / "hostfile"
        self.hostfile.write_text("".join(f"{name} slots={num_slots}\n" for name in addresses))
        self.write_settings(addresses)
        try:
            for name, address in addresses.items():
                self.hosts.append(Host(name, address, self.folder))
            self.join()
        except BaseException:
            self.close()
            raise

    def write_settings(self, addresses):
        lines = [f"{address} {name}" for name, address in addresses.items()]
        (self.folder / "hosts").write_text("\n".join(("127.0.0.1 localhost", *lines)) + "\n")
        (self.folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # a locked account would not be let in
        ssh = self.folder / "ssh"
        ssh.mkdir(mode=0o755)
        for name in ("id_ed25519", "ssh_host_ed25519_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", ssh / name], check=True)
        (ssh / "sshd_config").write_text(SSHD_CONFIG)
        (ssh / "ssh_config").write_text(SSH_CONFIG)
        host_key = (ssh / "ssh_host_ed25519_key.pub").read_text()
        (ssh / "known_hosts").write_text("".join(f"{name},{address} {host_key}" for name, address in addresses.items()))

    def join(self):
        """The cable, with an end called ``interface`` in each host."""
        one, other = self.hosts
        ends = ["type", "veth", "peer", "name", self.interface, "netns", str(other.pid)]
        self.configure(one, "link", "add", self.interface, *ends)
        for host in self.hosts:
            self.configure(host, "address", "add", f"{host.address}/24", "dev", self.interface)
            self.set_cable(host, is_up=True)

    def configure(self, host, *arguments):
        # in the host's network, but with the process numbers of this machine
        command = ["nsenter", "--target", str(host.pid), "--net", "ip", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, env={"PATH": SEARCH_PATH})
        if ended.returncode != 0:
            raise CannotMakeHostsError(f"ip {' '.join(arguments)}: {ended.stderr.strip()}")

    def set_cable(self, host, *, is_up):
        """Plugs ``host`` in, or takes it off the network."""
        self.configure(host, "link", "set", self.interface, "up" if is_up else "down")

    def close(self):
        for host in self.hosts:
            host.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
