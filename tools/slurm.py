"""A SLURM of one node on this machine, for as long as a test of studies on it runs. As root, on Debian or Ubuntu:

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python tools/slurm.py

Everything listens on the loopback alone and lies in a temporary folder, but for munge's key, which is made if there is
none. The study runs by submitit with two jobs; one job is cancelled, the worker of another is killed, and the table
must be that of a run without SLURM, bit for bit. Then the cluster is taken down again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "sinfo", "squeue", "scontrol")
#: As plain as can be: no accounting, no cgroups, no limits, this node alone.
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.log
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2
MpiDefault=none
ReturnToService=2
MinJobAge=300
KillWait=2
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def main() -> None:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        sys.exit(f"There is no {missing[0]} here: apt-get install --no-install-recommends {packages}")
    if os.geteuid() != 0:
        sys.exit("Only root can set a cluster up.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that the cluster ends, too
    base = Path(tempfile.mkdtemp(prefix="slurm-"))
    base.chmod(0o755)
    with cluster(base):
        check(base)
    shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def cluster(base: Path) -> Iterator[None]:
    """Up, and down again whatever happens."""
    for name in ("state", "spool"):
        (base / name).mkdir()
    host = socket.gethostname().split(".")[0]
    config = base / "slurm.conf"
    config.write_text(CONFIG.format(host=host, base=base, cpus=os.cpu_count()))
    # there is no "disabled" before 23.02; cgroup/v1 is loaded then, and asked for nothing
    version = tuple(int(part) for part in said("slurmd", "-V").split()[-1].split(".")[:2])
    (base / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if version >= (23, 2) else 'cgroup/v1'}\n")
    os.environ |= {"SLURM_CONF": str(config), "SLURMD_NODENAME": host}
    running: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        log = (base / f"{command[0]}.out").open("wb")
        running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def shown(name: str) -> str:
        parts = [path.read_text(errors="replace")[-2000:] for path in base.glob(f"{name}*.[lo][ou][gt]")]
        return f"{name} said:\n" + "\n".join(parts)

    try:
        key = Path("/etc/munge/munge.key")
        if not key.exists():
            subprocess.run(["/usr/sbin/mungekey", "--create"], check=True)
        if not said("munge", "-n"):
            folders = ["/run/munge", "/var/lib/munge", "/var/log/munge"]
            for folder in folders:
                Path(folder).mkdir(exist_ok=True, parents=True)
            subprocess.run(["chown", "-R", "munge:munge", *folders, "/etc/munge"], check=True)
            running.append(
                subprocess.Popen(
                    ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground"],
                    stdout=(base / "munged.out").open("wb"),
                    stderr=subprocess.STDOUT,
                )
            )
            wait(lambda: bool(said("munge", "-n")), lambda: shown("munged"))
        start("slurmctld", "-D", "-f", str(config))
        start("slurmd", "-D", "-f", str(config), "-N", host)
        wait(lambda: "idle" in said("sinfo", "-h", "-o", "%t"), lambda: shown("slurmctld") + shown("slurmd"))
        yield
    finally:
        said("scancel", "--user", "root")
        time.sleep(1)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def wait(ready: Callable[[], bool], why: Callable[[], str], seconds: float = 60) -> None:
    over = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > over:
            sys.exit(f"The cluster did not come up. {why()}")
        time.sleep(0.5)


def check(base: Path) -> None:
    """The same table with SLURM, one job cancelled and a worker killed, as without."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import submitit
    from attack import studies

    expected = studies.study(str(base / "here"), workers=1)
    executor = submitit.AutoExecutor(base / "logs", cluster="slurm")
    executor.update_parameters(timeout_min=30, cpus_per_task=1, slurm_setup=["export OMP_NUM_THREADS=1"])
    events: list[str] = []
    harm = threading.Thread(target=harmed, args=(base / "cluster", events), daemon=True)
    harm.start()
    found = studies.study(str(base / "cluster"), workers=2, executor=executor)
    jobs = len(list((base / "logs").glob("*_submitted.pkl")))
    print(f"{len(found)} rows by {jobs} jobs of SLURM; {'; '.join(events) or 'nothing went wrong'}")
    if len(events) < 2:
        sys.exit("The study was over before a job was cancelled and a worker killed.")
    if not found.drop(columns="seconds").equals(expected.drop(columns="seconds")):
        sys.exit("The table is not that of a run without SLURM.")
    print("The table is that of a run without SLURM, bit for bit.")


def harmed(out: Path, events: list[str]) -> None:
    """As soon as a job is at something it is cancelled; of the next, the worker is killed."""

    def at_work(but: set[str]) -> tuple[str, dict[str, Any]]:
        while True:
            for path in (out / "claims").glob("*"):
                with contextlib.suppress(OSError, ValueError):
                    worker = path.read_text()
                    if worker and worker not in but:
                        return worker, json.loads((out / "workers" / f"{worker}.json").read_text())
            time.sleep(0.05)

    first, where = at_work(set())
    job = Path(f"/proc/{where['pid']}/environ").read_bytes().split(b"SLURM_JOB_ID=")[1].split(b"\0")[0].decode()
    subprocess.run(["scancel", job], check=True)
    events.append(f"job {job} cancelled")
    _, where = at_work({first})
    os.kill(where["pid"], signal.SIGKILL)
    events.append(f"worker {where['pid']} killed")


if __name__ == "__main__":
    main()
