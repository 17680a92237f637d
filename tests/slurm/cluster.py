"""A real SLURM cluster on this machine: a munged, a slurmctld and two slurmd of its own in a folder of its own."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun", "scancel")
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"

# A job that is put back waits until its credential has expired: two minutes unless cred_expire says otherwise.
CONFIGURATION = """
ClusterName=dalle
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=20
MinJobAge=600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=30 State=UP
"""


def what_lacks() -> str | None:
    """Why no cluster can be started on this machine; None where one can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    return "slurmd starts jobs as root only" if os.geteuid() != 0 else None


class Cluster:
    """A running cluster; `stop` ends its daemons and all jobs.

    Args:
        folder: for keys, sockets, state and logs; best a short path, for sockets.

    Raises:
        RuntimeError: a daemon does not start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        folder.chmod(0o755)  # munged looks at the rights of all folders above its socket
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        folder = self.folder
        (folder / "slurm.conf").write_text(CONFIGURATION.format(host=self.host, folder=folder, ports=_free_ports(3)))
        (folder / "cgroup").mkdir()
        (folder / "state").mkdir()
        # Where no systemd runs, the newer plugin cannot start; this one finds an empty folder and is content.
        (folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupAutomount=yes\nCgroupMountpoint={folder}/cgroup\n"
        )
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{name}={folder / value}" for name, value in {**files, "log-file": "munged.log"}.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        self._until(lambda: (folder / "munge.socket").exists(), 60, "munged")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.run("sinfo", "--noheader", "--format=%T %D").strip() == "idle 2", 120, "slurmd")

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._daemons.append(
                # A session of its own: a Ctrl-C in the tests' terminal must not end it before its jobs. But it ends when the
                # tests are killed and cannot stop it.
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            )

    def _until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                logs = "".join(path.read_text()[-1500:] for path in sorted(self.folder.glob(f"{what}*.log")))
                raise RuntimeError(f"{what} did not start: {logs or self._said(what)}")
            time.sleep(0.2)

    def _said(self, what: str) -> str:
        return (self.folder / f"{what}.out").read_text()[-1500:]

    def stop(self) -> None:
        """End all jobs, then the daemons, then whatever a job may have left."""
        if len(self._daemons) > 1:
            subprocess.run(
                ["scancel", "--signal=KILL", "--full", "--state=RUNNING", "--user=root"],
                env=self.environment, capture_output=True, timeout=20, check=False,
            )  # fmt: skip
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            os.kill(process, signal.SIGKILL)

    def run(self, *command: str, check: bool = False, **environment: str) -> str:
        """Standard output and errors of a command on the cluster."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def show(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait(self, job: str, state: str, seconds: float) -> dict[str, str]:
        """Fields of a job once it is in a state."""
        end = time.monotonic() + seconds
        while (fields := self.show(job)).get("JobState") != state:
            assert time.monotonic() < end, f"job {job} is not {state}: {fields}\n{self.run('squeue')}"
            time.sleep(0.3)
        return fields

    def processes(self, command: str = "", **settings: str) -> list[int]:
        """The cluster's processes with a word in their command line and settings in their environment; not this one."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf", *(f"{name}={value}" for name, value in settings.items())}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if wanted <= environment and command in words and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        return found

    def until(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.run("squeue")
            time.sleep(0.1)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
