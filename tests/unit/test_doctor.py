"""The pre-flight check: each fault that is put into a node's report, or onto this machine, is found and named."""

import copy
import io
import json
import os
import pathlib
import random
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from largebatch.launch.commands import doctor as doctor_command
from largebatch.launch.doctor import findings, gathering, nodes, resources, software
from largebatch.launch.doctor.findings import FAILS, WARNS, Requirements
from largebatch.launch.doctor.gathering import gather
from largebatch.launch.doctor.rank_check import node_report
from largebatch.launch.supervise.launcher import free_port

GIB = 1 << 30
NEEDS = Requirements(memory_per_rank=2 * GIB, disk=1 * GIB)
GPU = {"name": "NVIDIA H200", "total": 140 * GIB, "free": 139 * GIB}


def healthy(host="alpha", **changes):
    """A report as node_report gives it, of a node that has everything; ``changes`` as "section.key": value."""
    report = {
        "world_size": 2,
        "num_local_ranks": 1,
        "versions": {"python": "3.12.1", "torch": "2.15.0", "deepspeed": "0.19.8", "largebatch": "0.1.0", "cuda": "13.2", "nccl": "2.29.7"},
        "executable": "/opt/venv/bin/python",
        "import_problem": None,
        "code": "0123456789abcdef",
        "kernels": {"cpp": "compiled", "triton": "available", "apex": "no: No module named 'apex'"},
        "tools": {"compiler": "g++ 12.2.0", "ninja": "1.13.0"},
        "devices": {"type": "cpu", "count": 8, "cpu": "a processor", "cuda_devices": []},
        "memory": {"total": 64 * GIB, "available": 60 * GIB},
        "disk": {"path": "/runs", "free": 100 * GIB, "total": 200 * GIB, "is_writable": True},
        "shared_memory": {"free": 30 * GIB, "total": 32 * GIB, "num_left_over": 0, "left_over": 0},
        "interfaces": {"host": host, "address": "192.0.2.1", "names": ["lo", "eth0"]},
        "limits": {"open_files": 65536, "locked_memory": None, "has_infiniband": False},
        "data": {"path": "/data", "problem": None, "num_entries": 12, "digest": "fedcba9876543210"},
        "environment": {},
    }  # fmt: skip
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = report
        for section in sections:
            node = node[section]
        node[last] = value
    return report


def network(**line):
    return {
        "backend": "gloo",
        "world_size": 2,
        "is_folder_shared": True,
        "all_reduce": [{"bytes": 1 << 20, "seconds": 1e-3, "bandwidth": 1e9}],
        "lines": [{"rank": 1, "host": "beta", "latency": 1e-4, "bandwidth": 1e9, "clock_offset": 0.0, **line}],
    }


def output_of(capsys, *records):
    """What ranks print: (kind, rank, record) each."""
    capsys.readouterr()
    for kind, rank, record in records:
        gathering.emit(kind, rank, record)
    return capsys.readouterr().out.splitlines()


def judged(capsys, *reports, figures=None, errors=(), slots=None, needs=NEEDS):
    records = [("node", rank, report) for rank, report in enumerate(reports)]
    records += [("network", 0, network() if figures is None else figures)] if not errors else []
    records += [("error", rank, {"host": "?", "message": message}) for rank, message in errors]
    return findings.judge(gather(output_of(capsys, *records), slots or {}), needs)


FAULTS = [
    ({"import_problem": "ImportError: no"}, FAILS, "does not start: ImportError: no"),
    ({"data.problem": "does not exist"}, FAILS, "--data '/data' does not exist"),
    ({"memory.available": GIB}, FAILS, "1.0 GiB of memory available, 1 ranks need about 2.0"),
    ({"disk.free": GIB // 2}, FAILS, "0.5 GiB free for results in '/runs', needed: 1.0"),
    ({"disk.is_writable": False}, FAILS, "'/runs', which cannot be written"),
    ({"num_local_ranks": 2, "shared_memory.free": 64 << 20}, FAILS, "64 MiB free in /dev/shm; 2 ranks need 140"),
    ({"shared_memory.num_left_over": 3, "shared_memory.left_over": 198 << 20}, WARNS, "3 files of earlier DeepSpeed runs hold 198 MiB"),
    ({"environment": {"GLOO_SOCKET_IFNAME": "eth1"}}, FAILS, "GLOO_SOCKET_IFNAME is 'eth1', which this node does not have"),
    ({"environment": {"NCCL_SOCKET_IFNAME": "ib"}}, FAILS, "NCCL_SOCKET_IFNAME is 'ib', which fits no interface"),
    ({"interfaces.address": "127.0.1.1"}, FAILS, "'beta' resolves to 127.0.1.1"),
    ({"interfaces.address": None}, FAILS, "'beta' resolves to no address"),
    ({"limits.open_files": 256}, WARNS, "256 open files allowed"),
    ({"limits.has_infiniband": True, "limits.locked_memory": 64 << 10}, WARNS, "only 64 KiB of memory may be locked"),
    ({"kernels.cpp": "no: ninja is not on the PATH"}, WARNS, "kernels 'cpp' cannot be had: ninja is not on the PATH"),
    ({"versions.torch": "2.14.0"}, FAILS, "torch differs: alpha has 2.15.0, beta has 2.14.0"),
    ({"versions.deepspeed": "0.19.9"}, FAILS, "deepspeed differs"),
    ({"versions.largebatch": "0.2.0", "code": "another"}, FAILS, "largebatch differs"),
    ({"versions.nccl": "2.30.0"}, FAILS, "nccl differs"),
    ({"versions.python": "3.11.9"}, FAILS, "python differs: alpha has 3.12, beta has 3.11"),
    ({"code": "another"}, FAILS, "the files of largebatch differ"),
    ({"data.digest": "another"}, FAILS, "the data folders differ"),
    ({"devices.cpu": "another"}, WARNS, "processors differ"),
    ({"devices.count": 0}, WARNS, "1 ranks share 0 cores"),
]  # fmt: skip


@pytest.mark.parametrize("changes, level, text", FAULTS, ids=[text for *_, text in FAULTS])
def test_each_fault_is_found_with_its_level_and_a_way_to_mend_it(capsys, changes, level, text):
    assert judged(capsys, healthy("alpha"), healthy("beta")) == []
    found = judged(capsys, healthy("alpha"), healthy("beta", **changes))
    (finding,) = [f for f in found if text in f.problem]
    assert finding.level == level and finding.fix
    assert finding.node == ("" if "differ" in text else "beta")
    assert [f for f in found if f is not finding and f.level == FAILS] == []


def test_faults_of_devices(capsys):
    two = {"type": "cuda", "count": 2, "cpu": "a processor", "cuda_devices": [GPU, GPU]}
    assert judged(capsys, healthy(devices=two), healthy("beta", devices=two)) == []
    (few,) = judged(capsys, healthy(devices=two, num_local_ranks=4))
    assert (few.level, few.problem) == (FAILS, "4 ranks, but 2 CUDA devices")
    used = two | {"cuda_devices": [GPU, GPU | {"free": 20 * GIB}]}
    (busy,) = judged(capsys, healthy(devices=used, num_local_ranks=2))
    assert (busy.level, busy.problem) == (WARNS, "CUDA device 1 has 20.0 of 140.0 GiB free")
    (mixed,) = judged(capsys, healthy(devices=two), healthy("beta"))
    assert mixed.level == FAILS and "device types differ: alpha has NVIDIA H200, beta has cpu" in mixed.problem
    other = two | {"cuda_devices": [GPU | {"name": "NVIDIA A100"}] * 2}
    (pace,) = judged(capsys, healthy(devices=two), healthy("beta", devices=other))
    assert pace.level == WARNS and "NVIDIA A100" in pace.problem
    (slow,) = judged(
        capsys, healthy(devices=two, num_local_ranks=2, **{"kernels.triton": "no: No module named 'triton'"})
    )
    assert slow.level == WARNS and "kernels 'triton' cannot be had: No module named 'triton'" in slow.problem


def test_faults_of_the_network(capsys):
    (clock,) = judged(capsys, healthy("alpha"), healthy("beta"), figures=network(clock_offset=-31.0))
    assert (clock.level, clock.node) == (WARNS, "beta") and "its clock is -31.0 s off rank 0's" in clock.problem
    slow = network()
    slow["all_reduce"][0]["bandwidth"] = 5e7
    (pace,) = judged(capsys, healthy("alpha"), healthy("beta"), figures=slow)
    assert pace.level == WARNS and "moves 50 MB/s at best" in pace.problem
    (apart,) = judged(capsys, healthy("alpha"), healthy("beta"), figures=network() | {"is_folder_shared": False})
    assert apart.level == WARNS and "do not share the folder" in apart.problem
    uneven = network()
    uneven["lines"] = [uneven["lines"][0] | {"rank": r, "bandwidth": b} for r, b in ((1, 1e9), (2, 2e8), (3, 1e9))]
    names = ("alpha", "beta", "gamma", "delta")
    (line,) = judged(capsys, *[healthy(n, world_size=4) for n in names], figures=uneven)
    assert (line.level, line.node) == (WARNS, "gamma") and "200 MB/s, the median is 1000" in line.problem
    apart = judged(capsys, healthy("alpha", environment={"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}), healthy("beta"), errors=[(1, "timed out")])  # fmt: skip
    assert [(f.level, f.node) for f in apart] == [(FAILS, "beta")]
    assert "does not meet the other ranks at 192.0.2.1:29500: timed out" in apart[0].problem


def test_a_node_without_a_report_is_named_with_its_last_words(capsys):
    output = output_of(capsys, ("node", 0, healthy("alpha", num_local_ranks=2)))
    output = ["n1: " + line for line in output] + ["n2: ModuleNotFoundError: No module named 'largebatch'"]
    gathered = gather(output, {"n1": 2, "n2": 2})
    found = findings.judge(gathered, NEEDS)
    assert list(gathered.nodes) == ["n1"] and (found[0].level, found[0].node) == (FAILS, "n2")
    assert "No module named 'largebatch'" in found[0].problem
    partial = output_of(capsys, ("node", 0, healthy("alpha", num_local_ranks=4, world_size=8)))
    assert gather(partial, {}).missing == ("4 of 8 ranks",)
    assert gather(["Segmentation fault"], {}).missing == ("this machine",)


def test_ranks_of_uneven_nodes_get_the_names_of_the_hostfile(capsys):
    reports = [("node", rank, healthy("same", num_local_ranks=n)) for rank, n in ((0, 3), (3, 1), (4, 2))]
    output = output_of(capsys, *reports, ("error", 5, {"host": "same", "message": "no"}))
    gathered = gather(output, {"x": 3, "y": 1, "z": 2})
    assert {name: r["rank"] for name, r in gathered.nodes.items()} == {"x": 0, "y": 3, "z": 4}
    assert gathered.errors == {"z": "no"} and gathered.missing == ()
    assert list(gather(output, {}).nodes) == ["same", "same (rank 3)", "same (rank 4)"]


texts = st.builds(lambda text, times: text * times, st.text(max_size=30), st.integers(0, 300))


@given(st.dictionaries(st.integers(0, 20), st.dictionaries(texts, texts, max_size=3), max_size=4), st.randoms())
def test_records_survive_other_lines_prefixes_and_any_order(records, order):
    old, sys.stdout = sys.stdout, io.StringIO()
    try:
        for rank, record in records.items():
            gathering.emit("node", rank, record)
        out, sys.stdout = sys.stdout.getvalue(), old
    finally:
        sys.stdout = old
    printed = [f"node{order.randint(1, 9)}: {line}" for line in out.split("\n") if line] + ["noise", ""]
    assert all(len(line) < 4096 for line in printed)
    order.shuffle(printed)
    found, others = gathering.collect(printed)
    assert found.get("node", {}) == records and sorted(others) == ["", "noise"]


def test_a_record_that_lost_a_line_counts_as_none(capsys):
    output = output_of(capsys, ("node", 0, {"long": "x" * 10_000}))
    assert len(output) == 4
    lost = random.Random(0).randrange(4)
    assert gathering.collect(output[:lost] + output[lost + 1 :])[0] == {}


def test_this_machine_as_it_is(tmp_path):
    report = node_report(data=str(tmp_path), output=str(tmp_path / "not" / "yet" / "there"))
    assert report["versions"].keys() == {"python", "torch", "deepspeed", "largebatch", "cuda", "nccl"}
    assert report["versions"]["deepspeed"] and report["import_problem"] is None
    assert 0 < report["memory"]["available"] <= report["memory"]["total"]
    assert report["disk"]["is_writable"] and 0 < report["disk"]["free"] <= report["disk"]["total"]
    assert report["kernels"]["cpp"] in ("compiled", "on first use") or report["kernels"]["cpp"].startswith("no: ")
    assert "lo" in report["interfaces"]["names"] and report["data"]["problem"] == "is empty"
    assert json.loads(json.dumps(report)) == report, "JSON types only"
    assert report.keys() == healthy().keys() and report["devices"].keys() == healthy()["devices"].keys()


def test_data_folders(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "labels").write_bytes(b"0123")
    whole = resources.data(str(tmp_path))
    assert (whole["problem"], whole["num_entries"]) == (None, 3)
    (tmp_path / "labels").write_bytes(b"01")
    assert resources.data(str(tmp_path))["digest"] != whole["digest"]
    assert resources.data(str(tmp_path / "none"))["problem"] == "does not exist"
    assert resources.data(str(tmp_path / "labels"))["problem"] == "is not a folder"
    (tmp_path / "broken").symlink_to(tmp_path / "broken")
    assert resources.data(str(tmp_path))["problem"] == f"holds a broken link ({tmp_path / 'broken'})"


def test_the_control_groups_limit_counts(monkeypatch):
    texts = {"/proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 900 kB\n"}
    monkeypatch.setattr(resources, "read_text", lambda path: texts.get(path, ""))
    assert resources.memory() == {"total": 1_024_000, "available": 921_600}
    texts |= {"/sys/fs/cgroup/memory.max": "500000\n", "/sys/fs/cgroup/memory.current": "480000\n"}
    assert resources.memory() == {"total": 500_000, "available": 20_000}
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert resources.memory()["available"] == 921_600


def test_what_keeps_the_cpp_kernels_from_being_built(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert software.cpp_kernels() == "no: there is no C++ compiler ('no-such-compiler' is not on the PATH)"
    assert software.first_line("no-such-compiler") is None
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.cpp_kernels() == "no: ninja is not on the PATH"


@pytest.mark.parametrize(
    "text, message",
    [
        ("alpha slots=2\nbeta\n", "line 2: 'beta'; expected 'NAME slots=N'"),
        ("alpha slots=0", "line 1: 'alpha slots=0'"),
        ("alpha slots=2\n\nalpha slots=2", "line 3: 'alpha' is there twice"),
        ("# nothing\n", "names no node"),
    ],
)
def test_hostfiles_that_are_refused(tmp_path, capsys, text, message):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ValueError, match="hostfile") as error:
        nodes.read_hostfile(str(tmp_path / "hostfile"))
    assert message in str(error.value)
    assert doctor_command.main(["--hostfile", str(tmp_path / "hostfile")]) == 2
    assert message in capsys.readouterr().err


def test_a_hostfile(tmp_path):
    (tmp_path / "hostfile").write_text("# two\nbeta slots=4\n\nalpha  slots=2 # the old one\n")
    assert list(nodes.read_hostfile(str(tmp_path / "hostfile")).items()) == [("beta", 4), ("alpha", 2)]


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """ssh and pdsh on an otherwise empty PATH; returns what sets the shell lines that ssh is."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def program(name, text):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)

    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    program("pdsh", "exit 0")
    return lambda text: program("ssh", text)


@pytest.mark.parametrize(
    "ssh, problem, fix",
    [
        ("echo 'root@n1: Permission denied (publickey).' >&2; exit 255", "no login over ssh: root@n1: Permission denied", "ssh-copy-id n1"),
        ("echo 'Host key verification failed.' >&2; exit 255", "Host key verification failed", "ssh-keyscan n1"),
        ("echo 'ssh: Could not resolve hostname n1' >&2; exit 255", "Could not resolve hostname", "/etc/hosts"),
        ("exit 3", "has no folder", "clone to the same path"),
        ("exit 4", "has no Python at", "same path"),
        ("exit 7", "exit code 7", "ssh n1 true"),
    ],
)  # fmt: skip
def test_logins_that_fail(fake_ssh, ssh, problem, fix):
    fake_ssh(ssh)
    (finding,) = nodes.launching_findings(["n1"], ssh_port=2222)
    assert (finding.level, finding.node) == (FAILS, "n1")
    assert problem in finding.problem and fix in finding.fix


def test_logins_that_work_and_tools_that_are_missing(fake_ssh, tmp_path):
    fake_ssh('[ "$6 $7" = "2222 n1" ] && exec /bin/sh -c "$8"')  # what ssh would run on the node, run here
    assert nodes.launching_findings(["n1"], ssh_port=2222) == []
    os.remove(tmp_path / "bin" / "pdsh")
    (finding,) = nodes.launching_findings(["n1"], ssh_port=2222)
    assert "pdsh is not on the PATH" in finding.problem
    os.remove(tmp_path / "bin" / "ssh")
    assert [f.problem.split()[0] for f in nodes.launching_findings(["n1"], ssh_port=None)] == ["ssh", "pdsh"]


def test_an_environment_file_that_stops_the_launcher(fake_ssh, tmp_path):
    fake_ssh("exit 0")
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n# the fast one\nA='b c'\n\n")
    found = nodes.launching_findings([], ssh_port=None)
    assert {f.problem.split(", ")[1].split(" is ")[0] for f in found} == {"line 2: '# the fast one'", "line 4: ''"}


def test_the_examples_are_accepted(fake_ssh, tmp_path):
    fake_ssh("exit 0")
    launch = pathlib.Path(__file__).resolve().parents[2] / "launch"
    assert nodes.read_hostfile(str(launch / "hostfile.example")) == {"node1": 8, "node2": 8}
    (tmp_path / ".deepspeed_env").write_text((launch / "deepspeed_env.example").read_text())
    assert nodes.launching_findings([], ssh_port=None) == []


def test_reading_what_another_launcher_printed(tmp_path, capsys):
    reports = [healthy("alpha"), healthy("beta")]
    records = [*(("node", rank, r) for rank, r in enumerate(reports)), ("network", 0, network())]
    output = output_of(capsys, *records)
    (tmp_path / "out").write_text("\n".join(["srun: job 1", *output]))
    assert doctor_command.main(["--read", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "ready: 2 ranks on 2 nodes" in out and "rank 0 to beta: latency 100 us, 1000 MB/s, clock +0.00 ms" in out
    assert doctor_command.main(["--read", str(tmp_path / "out"), "--need-memory", "61", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["is_ready"] and told["nodes"].keys() == {"alpha", "beta"}
    assert [f["node"] for f in told["findings"]] == ["alpha", "beta"]
    assert doctor_command.main(["--read", str(tmp_path / "none")]) == 2
    with pytest.raises(SystemExit):
        doctor_command.main(["--need-memory", "-1"])


@pytest.mark.launcher
def test_two_ranks_of_this_machine(tmp_path):
    """Through the launcher, with two things wrong: no such data, and more memory wanted than there is."""
    before = set(os.listdir("/dev/shm"))
    command = [
        sys.executable,
        "-m",
        "largebatch",
        "doctor",
        "--ranks",
        "2",
        "--json",
        "--master_port",
        str(free_port()),
    ]
    command += ["--data", str(tmp_path / "none"), "--need-memory", "1000000", "--timeout", "150"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 1, ended.stderr
    told = json.loads(ended.stdout)
    (report,) = told["nodes"].values()
    assert (report["num_local_ranks"], report["world_size"], told["network"]["world_size"]) == (2, 2, 2)
    assert [figures["bytes"] for figures in told["network"]["all_reduce"]] == [4, 1 << 20, 1 << 24]
    assert all(figures["seconds"] > 0 for figures in told["network"]["all_reduce"])
    problems = [f["problem"] for f in told["findings"] if f["level"] == FAILS]
    assert any(p.endswith("none' does not exist") for p in problems) and any("2000000.0" in p for p in problems)
    assert len(problems) == 2
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "deepspeed" in name]


def test_a_report_is_not_changed_by_judging_it(capsys):
    report = healthy("alpha")
    kept = copy.deepcopy(report)
    judged(capsys, report)
    assert report == kept
