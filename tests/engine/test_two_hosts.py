"""The unmodified deepspeed launcher over two hosts (namespaces with an address and an sshd each), and the check before it."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from support import hosts, launching

pytestmark = [pytest.mark.launcher, pytest.mark.hosts]
ROOT = launching.ROOT
RUN = ("--deepspeed_config", ROOT / "ds_configs/lenet_digits_lars_480.json", "--steps", 6, "--zero-stage", 2)
EXACT = ("loss", "lr", "is_applied", "epoch", "layers", "top1", "test_loss")
"""Fields of the events that are numbers of the training; the others are times."""


def require_hosts():
    reason = hosts.reason_against()
    if reason is not None:
        pytest.skip(f"two hosts: {reason}")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    require_hosts()
    try:
        pair = hosts.TwoHosts(tmp_path_factory.mktemp("two_hosts"))
    except hosts.CannotMakeHostsError as error:
        pytest.skip(f"two hosts: {error}")
    with pair:
        write_environment(pair.folder, pair.interface)
        yield pair


def write_environment(folder, interface):
    """What ranks on other nodes get from the launcher: ssh gives them next to nothing."""
    env = launching.environment()
    names = ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")
    lines = [f"{name}={env[name]}\n" for name in names if name in env]
    (folder / ".deepspeed_env").write_text("".join([*lines, f"GLOO_SOCKET_IFNAME={interface}\n"]))


def on_first_host(pair, *command):
    """Standard output of a command that ends well, on the first host in the folder of the pair."""
    code, out, err = pair.hosts[0].run(
        *command, folder=pair.folder, env=launching.environment(), seconds=2 * launching.SECONDS
    )
    assert code == 0, f"{out}\n{err}"
    return out


def doctor(pair, *arguments, folder=None):
    """(exit code, report) of ``largebatch doctor --hostfile`` on the first host."""
    command = [sys.executable, "-m", "largebatch", "doctor", "--hostfile", pair.hostfile, "--json", *arguments]
    code, out, err = pair.hosts[0].run(
        *command, folder=folder or pair.folder, env=launching.environment(), seconds=launching.SECONDS
    )
    assert code in (0, 1), f"{out}\n{err}"
    return code, json.loads(out)


def numbers(folder):
    """Every event of a run, without times."""
    events = [e for kind in ("step", "layers", "evaluation", "end") for e in launching.events(folder, kind)]
    return [{k: v for k, v in event.items() if k in ("event", "step", *EXACT)} for event in events]


def test_two_hosts_train_the_same_as_one(two_hosts, tmp_path):
    """LARS under ZeRO 2, a rank on each host, against two ranks on one host: the same bits.

    Equal, not near: both ranks see the same samples, sums of two addends do not depend on who adds, and gloo is gloo over
    a cable and over the loopback.
    """
    over_hosts, on_one = two_hosts.folder / "over_hosts", two_hosts.folder / "on_one"
    out = on_first_host(
        two_hosts, "bash", ROOT / "launch/ssh_nodes.sh", two_hosts.hostfile, *RUN, "--output", over_hosts
    )
    assert "ready: 2 ranks on 2 nodes" in out and f"results     {over_hosts}" in out, "the check before the run"
    assert "do not share" not in out
    assert re.search(r"node1: +model +lenet", out) and "node2: " in out, "pdsh names the host before each line"
    on_first_host(two_hosts, "deepspeed", "--num_accelerators", 2, ROOT / "launch/train.py", *RUN, "--output", on_one)
    events = numbers(over_hosts)
    assert [e["event"] for e in events].count("layers") == 6 and "trust_ratio" in json.dumps(events)
    assert events == numbers(on_one)
    one, other = launching.final_weights(over_hosts), launching.final_weights(on_one)
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert [host.run("ls", "-A", "/dev/shm")[1] for host in two_hosts.hosts] == ["", ""]


LONG_RUN = (*RUN[:2], "--steps", 60, "--zero-stage", 2, "--set", "largebatch.save_every_epochs=1")


def test_a_rank_that_dies_on_the_other_host(two_hosts):
    """`largebatch run` on the first host sees no process of the second, and starts both again all the same."""
    killed, whole = two_hosts.folder / "killed", two_hosts.folder / "whole"
    run = two_hosts.hosts[0].start(
        sys.executable, "-m", "largebatch", "run", "--max-restarts", 5, "--back-off", 0, "--grace", 30,
        "deepspeed", "--hostfile", two_hosts.hostfile, ROOT / "launch/train.py", *LONG_RUN, "--output", killed,
        folder=two_hosts.folder, env=launching.environment(),
    )  # fmt: skip
    launching.wait_for_steps(killed, 10, run)
    code, _, _ = two_hosts.hosts[1].run("pkill", "-KILL", "-f", "launch/train.py --local_rank")
    out, err = run.communicate(timeout=4 * launching.SECONDS)
    assert code == 0, "there was a rank to kill on the second host"
    assert run.returncode == 0, f"{out}\n{err}"
    assert "Restart 1 of at most 5" in err and "Restart 2" not in err
    on_first_host(
        two_hosts, "deepspeed", "--num_accelerators", 2, ROOT / "launch/train.py", *LONG_RUN, "--output", whole
    )
    last = {e["step"]: e for e in numbers(killed) if e["event"] == "step"}
    assert last == {e["step"]: e for e in numbers(whole) if e["event"] == "step"} and len(last) == 60
    one, other = launching.final_weights(killed), launching.final_weights(whole)
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_doctor_sees_both_nodes_and_what_they_do_not_share(two_hosts):
    """Data that only one of them has, and results that go to a folder of each node's own."""
    for host, script in zip(two_hosts.hosts, ("mkdir /run/data && echo 1 > /run/data/file", "true"), strict=True):
        assert host.run("sh", "-c", script)[0] == 0
    code, report = doctor(two_hosts, "--data", "/run/data", "--output", "/run/results", "--timeout", 150)
    fails = [f for f in report["findings"] if f["level"] == "fails"]
    assert code == 1 and [(f["node"], f["problem"]) for f in fails] == [("node2", "--data '/run/data' does not exist")]
    assert [f["problem"] for f in report["findings"] if "do not share the folder for results" in f["problem"]]
    assert {name: node["interfaces"]["address"] for name, node in report["nodes"].items()} == {
        host.name: host.address for host in two_hosts.hosts
    }
    assert report["nodes"]["node1"]["data"]["num_entries"] == 1
    (line,) = report["network"]["lines"]
    assert (line["rank"], line["host"]) == (1, "node2") and line["bandwidth"] > 0 and line["latency"] > 0
    assert abs(line["clock_offset"]) < 1, "both hosts have this machine's clock"


def test_doctor_tells_of_ranks_that_do_not_meet(two_hosts, tmp_path):
    """Both nodes are named by an interface over which they cannot see each other."""
    write_environment(tmp_path, "lo")
    code, report = doctor(two_hosts, "--timeout", 5, folder=tmp_path)
    fails = [f for f in report["findings"] if f["level"] == "fails"]
    assert code == 1 and fails and report["network"] is None and report["nodes"].keys() == {"node1", "node2"}
    assert all("does not meet the other ranks at 192.0.2.1:29500" in f["problem"] for f in fails)
    assert all("GLOO_SOCKET_IFNAME" in f["fix"] for f in fails)


def test_doctor_names_a_node_off_the_network(two_hosts):
    two_hosts.set_cable(two_hosts.hosts[1], is_up=False)
    try:
        code, report = doctor(two_hosts)
    finally:
        two_hosts.set_cable(two_hosts.hosts[1], is_up=True)
    (finding,) = report["findings"]
    assert code == 1 and finding["node"] == "node2" and "no login over ssh" in finding["problem"]


def processes_of(folder):
    """Numbers of processes whose command line names ``folder``."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            pass
    return found


def test_hosts_leave_nothing_behind(tmp_path):
    require_hosts()
    interfaces = set(os.listdir("/sys/class/net"))
    with hosts.TwoHosts(tmp_path) as pair:
        orphan = pair.hosts[0].start("sh", "-c", f"touch /dev/shm/left; setsid sleep 1000 {tmp_path} & cat")
        code, out, _ = pair.hosts[1].run("ssh", "node1", "while [ ! -e /dev/shm/left ]; do sleep .1; done; hostname")
        assert (code, out) == (0, "node1\n")
        assert processes_of(tmp_path)
    orphan.communicate()
    assert not processes_of(tmp_path) and not os.path.exists("/dev/shm/left")
    assert set(os.listdir("/sys/class/net")) == interfaces


def test_hosts_end_with_whoever_started_them(tmp_path):
    """Also when a test run is killed."""
    require_hosts()
    code = f"import sys, time; sys.path.insert(0, {str(ROOT / 'tests')!r}); from support import hosts; "
    code += f"pair = hosts.TwoHosts({str(tmp_path)!r}); print(*(h.process.pid for h in pair.hosts), flush=True); time.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    first = [int(number) for number in owner.stdout.readline().split()]
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{number}") for number in first) or processes_of(tmp_path):
        assert time.monotonic() < deadline, "the hosts live on"
        time.sleep(0.05)
    assert len(first) == 2
