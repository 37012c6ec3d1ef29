"""The cluster and the hosts themselves: do they do what the tests of the launch scripts assume?"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import TwoHosts
from namespaces import until
from slurm import SlurmCluster
from small_disk import small_disk

FOLDER = Path(__file__).parent

TORCHRUN = (
    f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 "
    f"--rdzv-backend c10d --rdzv-id test --rdzv-endpoint {{first}}:29400 {FOLDER}/all_reduce.py 3"
)

# The batch script, a child of it, and two tasks with a child each note the signals they get.
WITNESSES = f"""
trap 'echo batch SIGTERM >> notes' TERM
trap 'echo batch SIGUSR1 >> notes' USR1
python {FOLDER}/witness.py notes sibling > /dev/null &
srun bash -c 'exec python {FOLDER}/witness.py notes $SLURMD_NODENAME' &
while true; do wait; done
"""
EVERYONE = [x + y for x in ("n1", "n2", "sibling") for y in ("", ".child")]
TASKS = {*EVERYONE[:4]}
SCRIPT = {"batch", "sibling"}  # the process group of the batch script, to which srun belongs too


def links() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def processes_with(text: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.parametrize("kind", [SlurmCluster, TwoHosts])
def test_nothing_is_left(kind: Callable):
    with pytest.raises(ZeroDivisionError), kind() as cluster:
        host = list(cluster.addresses)[-1]
        assert cluster.uplink in links()
        with small_disk(cluster.folder / "disk", 1):
            cluster.run(host, "setsid sleep 1000 &")
            until("it runs", lambda: cluster.processes(host, "^sleep 1000"), timeout=5)
            assert str(cluster.folder) in Path("/proc/mounts").read_text()
            raise ZeroDivisionError
    assert cluster.uplink not in links()
    assert not processes_with(str(cluster.folder))
    assert str(cluster.folder) not in Path("/proc/mounts").read_text()
    assert not cluster.folder.exists()


def test_a_killed_test_leaves_only_its_folder():
    """Hosts do not outlive the tests."""
    program = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import slurm, os\n"
        "cluster = slurm.SlurmCluster().__enter__(); print(cluster.folder, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    folder = done.stdout.strip()
    assert folder, done.stderr
    until("processes are gone", lambda: not processes_with(folder), timeout=10)
    assert folder not in Path("/proc/mounts").read_text()
    shutil.rmtree(folder)


def test_two_nodes(slurm: SlurmCluster):
    options = ("-N2", "--ntasks-per-node=1", "--gpus-per-node=1")
    job = slurm.sbatch("which python; srun hostname; srun env", *options)
    slurm.wait(job, 20)
    lines = slurm.log(job).splitlines()
    assert lines[0] == str(Path(sys.executable).parent / "python")
    assert sorted(lines[1:3]) == ["n1", "n2"]
    assert lines.count("CUDA_VISIBLE_DEVICES=0") == 2
    assert slurm.client("srun", "-N2", "hostname").stdout.split() in (["n1", "n2"], ["n2", "n1"])


def notes(slurm: SlurmCluster) -> list[str]:
    file = slurm.jobs / "notes"
    return file.read_text().splitlines() if file.exists() else []


def witnesses(slurm: SlurmCluster) -> str:
    job = slurm.sbatch(WITNESSES, "-N2", "--ntasks-per-node=1")
    ready = [f"{name} ready 0" for name in EVERYONE]
    until("all are ready", lambda: set(ready) <= set(notes(slurm)), timeout=20)
    return job


def has(slurm: SlurmCluster, signal: str) -> set[str]:
    return {line.split()[0] for line in notes(slurm) if line.split()[1] == signal}


@pytest.mark.parametrize(
    "options, receivers",
    [
        ("", TASKS),
        ("--batch", {"batch"}),
        ("--full", TASKS | SCRIPT),
    ],
)
def test_who_gets_a_signal(slurm: SlurmCluster, options: str, receivers: set[str]):
    job = witnesses(slurm)
    slurm.scancel(job, *options.split(), signal="USR1")
    until("all have it", lambda: has(slurm, "SIGUSR1") >= receivers, timeout=5)
    assert has(slurm, "SIGUSR1") == receivers


def test_full_term_kills_the_tasks_through_srun(slurm: SlurmCluster):
    """srun is a child of the batch script: SIGTERM makes it kill its step without a warning."""
    job = witnesses(slurm)
    slurm.scancel(job, "--full", signal="TERM")
    until("tasks are gone", lambda: not slurm.processes("n2", "witness"), timeout=5)
    assert has(slurm, "SIGTERM") == SCRIPT


def over_ssh(hosts: TwoHosts, *commands: str) -> list[subprocess.Popen]:
    return [
        subprocess.Popen(
            [*hosts.ssh, name, command],
            stdout=(hosts.folder / f"output-{name}").open("w"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        for name, command in zip(hosts.names, commands, strict=True)
    ]


def outputs(hosts: TwoHosts) -> list[str]:
    return [(hosts.folder / f"output-{name}").read_text() for name in hosts.names]


def test_torchrun_over_ssh(hosts: TwoHosts):
    started = over_ssh(hosts, *[TORCHRUN.format(first="host1")] * 2)
    assert [p.wait(timeout=60) for p in started] == [0, 0], outputs(hosts)
    for name, output in zip(hosts.names, outputs(hosts), strict=True):
        assert output.count(f"{name} has 3 of 2") == 3


def test_cut_link(hosts: TwoHosts):
    def ranks(times: int) -> list[str]:
        variables = "MASTER_ADDR=host1 MASTER_PORT=29500 WORLD_SIZE=2 RANK="
        program = shlex.join([sys.executable, str(FOLDER / "all_reduce.py"), str(times)])
        return [f"{variables}{rank} {program}" for rank in range(2)]

    started = over_ssh(hosts, *ranks(1000))
    until("they run", lambda: all("has 3" in x for x in outputs(hosts)), timeout=60)
    hosts.cut_link("host2")
    unreached = hosts.run("host1", [*hosts.ssh, "-o", "ConnectTimeout=1", "host2", "hostname"])
    assert unreached.returncode == 255
    # The one ssh is cut off too: its end is seen on the host.
    assert started[0].wait(timeout=30) == 1
    until("rank 1 is gone", lambda: not hosts.processes("host2", "all_reduce"), timeout=30)
    assert re.search("[Tt]imed out", outputs(hosts)[0])
    hosts.restore_link("host2")
    started[1].wait(timeout=30)
    started = over_ssh(hosts, *ranks(3))
    assert [p.wait(timeout=60) for p in started] == [0, 0], outputs(hosts)


def test_kill_and_small_disk(hosts: TwoHosts):
    hosts.run("host1", "setsid sleep 1000 & setsid sleep 1001 &")
    until("both run", lambda: len(hosts.processes("host1", "^sleep 100")) == 2, timeout=5)
    killed = hosts.kill("host1", "^sleep 1000")
    assert len(killed) == 1
    until("it is gone", lambda: not os.path.exists(f"/proc/{killed[0]}"), timeout=5)
    assert hosts.processes("host1", "^sleep 1001")
    assert not hosts.processes("host2", "sleep")
    with small_disk(hosts.folder / "disk", 1) as disk:
        done = hosts.run("host1", f"head --bytes=2M /dev/zero > {disk}/file")
        assert "No space left on device" in done.stdout
        assert hosts.run("host2", ["stat", "-c", "%s", f"{disk}/file"]).stdout == f"{2**20}\n"
    assert not list((hosts.folder / "disk").iterdir())
