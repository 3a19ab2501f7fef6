"""A real Slurm cluster of toy nodes on this machine, up in about a second, with faults to inject."""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from launcher.processes import free_port
from tests.slurm import accounting, cgroups, nodes
from tests.slurm.daemons import Daemons, clean_environment, program
from tests.slurm.processes import descendants, environment_of
from tests.slurm.settings import Settings, Site, gres_conf, slurm_conf

__all__ = ["Cluster", "Settings", "unavailable_reason"]

UP = ("idle", "mixed", "allocated", "completing")
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "ip", "unshare", "setpriv")


def unavailable_reason() -> str | None:
    """Return why no cluster can run here, or None when one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster of namespaces needs root"
    for name in NEEDED:
        try:
            program(name)
        except FileNotFoundError as error:
            return str(error)
    refused = nodes.namespaces_refused()
    return f"this machine makes no namespaces: {refused}" if refused else None


class Cluster:
    """A Slurm cluster that runs inside a `with` block: everything it is lies in `root` and is gone afterwards."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.names = [f"node{number}" for number in range(1, self.settings.nodes + 1)]
        self.root = Path()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        nodes.sweep()
        self.root = Path(tempfile.mkdtemp(prefix=Path(nodes.ROOT_PREFIX).name, dir=Path(nodes.ROOT_PREFIX).parent))
        self._daemons = Daemons(self.root)
        self._network = nodes.create_network(self.root)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the cluster, jobs included, and remove its network and its folder."""
        for name in self.names:
            self.power_off(name)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._daemons.end(name)
        nodes.remove_network(self._network)
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def env(self) -> dict[str, str]:
        """Return what a process needs in its environment to talk to this cluster."""
        path = f"{self.root}/bin:{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
        return {"SLURM_CONF": f"{self.root}/slurm.conf", "PATH": path}

    def run(
        self,
        *command: str,
        check: bool = True,
        timeout: float = 60,
        env: dict[str, str] | None = None,
        user: str | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Run a command in the cluster's environment, as `user` if given, and return its stdout, stripped."""
        account = pwd.getpwnam(user) if user else None
        home = {"HOME": account.pw_dir, "USER": account.pw_name} if account else {}
        done = subprocess.run(
            command,
            env={**clean_environment(), **self.env, **home, **(env or {})},
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def wait_nodes(self, state: str | tuple[str, ...], names: list[str] | None = None, timeout_s: float = 60) -> None:
        """Wait until all nodes, or the named ones, are in a state of sinfo's, such as "idle" or "down"."""
        wanted = (state,) if isinstance(state, str) else state
        end = time.monotonic() + timeout_s
        while True:
            states = self.node_states()
            if all(states.get(name) in wanted for name in names or self.names):
                return
            for daemon in ("munged", "slurmctld"):
                self._daemons.ensure_alive(daemon)
            if time.monotonic() > end:
                raise TimeoutError(f"nodes are {states} after {timeout_s} s, wanted {' or '.join(wanted)}")
            time.sleep(0.1)

    def node_states(self) -> dict[str, str]:
        """Return the state of each node, without sinfo's marks for silent or powered-down ones."""
        lines = self.run("sinfo", "-a", "-h", "-N", "-o", "%N %T", check=False).splitlines()
        return {name: state.rstrip("*~#!%$@^-") for name, state in (line.split() for line in lines)}

    def power_off(self, node: str) -> None:
        """Cut the power of a node: every process on it is gone at once."""
        nodes.cut_power(self._daemons, self._network, self.names.index(node), node)

    def power_on(self, node: str) -> None:
        """Boot a node that has no power and wait until Slurm may use it again."""
        self._boot(node)
        self.wait_nodes(UP, [node])

    def forget_jobs(self) -> None:
        """Restart the controller without its memory of jobs: what MinJobAge does some minutes after a job's end."""
        self._daemons.end("slurmctld")
        self._start_controller()
        self.wait_nodes(UP)

    def kill_controller(self) -> None:
        """End the controller as a crash of its machine does; the jobs run on."""
        self._daemons.kill("slurmctld")

    def start_controller(self) -> None:
        """Start the controller again, with its memory of jobs."""
        self._start_controller(remember=True)
        self.wait_nodes(UP)

    def kill_slurmd(self, node: str) -> None:
        """Kill the slurmd daemon of a node; its steps live on. To mend it, cut the power and switch it on."""
        for pid in nodes.slurmd_pids(self._daemons, node):
            os.kill(pid, signal.SIGKILL)

    def unplug(self, node: str) -> None:
        """Pull a node's cable: its processes live on, but nobody reaches them."""
        nodes.set_cable(self._network, self.names.index(node), "down")

    def plug(self, node: str) -> None:
        """Put a node's cable back."""
        nodes.set_cable(self._network, self.names.index(node), "up")

    def pids_on(self, node: str) -> list[int]:
        """Return the host pids of everything that runs on a node, parents before children."""
        return descendants(self._daemons.pid(node)) if node in self._daemons.names() else []

    def environment_of(self, pid: int) -> dict[str, str]:
        """Return the environment a process was started with; empty when it is gone."""
        return environment_of(pid)

    def rank_pids(self, job_id: int | str) -> dict[int, list[int]]:
        """Return the host pids of each rank of a job's step, the task itself before its children."""
        found: dict[int, list[int]] = {}
        for node in self.names:
            for pid in self.pids_on(node):
                environment = environment_of(pid)
                # the batch script and its srun have the job's id as well, and say that they are rank 0
                if environment.get("SLURM_JOB_ID") == str(job_id) and "SLURM_STEP_ID" in environment:
                    found.setdefault(int(environment["SLURM_PROCID"]), []).append(pid)
        return dict(sorted(found.items()))

    def job(self, job_id: int | str) -> dict[str, str]:
        """Return what the controller knows about a job, by scontrol's names."""
        line = self.run("scontrol", "-o", "show", "job", str(job_id)).splitlines()[0]
        return dict(re.findall(r"(?:^|\s)([A-Za-z_:/]+)=(.*?)(?=\s[A-Za-z_:/]+=|$)", line))

    def wait_job(
        self, job_id: int | str, predicate: Callable[[dict[str, str]], object], timeout_s: float = 60
    ) -> dict[str, str]:
        """Wait until a job is as the predicate wants it and return what the controller then knows about it."""
        end = time.monotonic() + timeout_s
        while not predicate(job := self.job(job_id)):
            if time.monotonic() > end:
                known = {key: job.get(key) for key in ("JobState", "Reason", "Restarts", "NodeList", "ExitCode")}
                raise TimeoutError(f"job {job_id} is {known} after {timeout_s} s")
            time.sleep(0.1)
        return job

    def _start(self) -> None:
        for folder in ("", "run", "log", "state", "spool", "bin", "dev"):
            (self.root / folder).mkdir(exist_ok=True)
            (self.root / folder).chmod(0o755)  # any user may submit
        database = self.settings.accounting == "dbd"
        site = Site(
            root=self.root,
            host=socket.gethostname().split(".")[0],
            network=self._network,
            controller_port=free_port(),
            dbd_port=free_port() if database else 0,
        )
        self._write_hosts(site)
        self._start_munge(site)
        if database:
            accounting.start_database(self._daemons, site)
        (self.root / "slurm.conf").write_text(slurm_conf(self.settings, site, self.names))
        (self.root / "cgroup.conf").write_text(cgroups.CONF)
        self._make_devices()
        if database:
            accounting.enrol(self.root, {**clean_environment(), **self.env}, ("root", "nobody"))
        if self.settings.accounting == "shim":
            accounting.install_shim(self.root)
        self._start_controller()
        for name in self.names:
            self._boot(name)
        self.wait_nodes("idle")

    def _start_controller(self, remember: bool = False) -> None:
        command = [program("slurmctld"), "-D", *([] if remember else ["-c"]), "-f", f"{self.root}/slurm.conf"]
        self._daemons.start("slurmctld", command)

    def _boot(self, name: str) -> None:
        spool = self.root / "spool" / name
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir()
        own_cgroup = self.settings.proctrack == "cgroup"
        nodes.boot(self._daemons, self._network, self.names.index(name), name, own_cgroup)

    def _write_hosts(self, site: Site) -> None:
        known = [("127.0.0.1", "localhost"), (site.network.controller, site.host)]
        known += [(site.network.address(index), name) for index, name in enumerate(self.names)]
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for address, name in known))

    def _start_munge(self, site: Site) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        run, log = self.root / "run", self.root / "log"
        command = [program("munged"), "--foreground", "--force", f"--key-file={key}", f"--socket={site.munge_socket}"]
        command += [f"--pid-file={run}/munged.pid", f"--seed-file={run}/munge.seed", f"--log-file={log}/munged.log"]
        self._daemons.start("munged", command)
        self._daemons.wait_until("munged", site.munge_socket.exists)

    def _make_devices(self) -> None:
        if not self.settings.gpus:
            return
        for number in range(self.settings.gpus):
            with contextlib.suppress(FileExistsError):  # the null device under a GPU's name
                os.mknod(self.root / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        (self.root / "gres.conf").write_text(gres_conf(self.settings, self.root))
