"""Accounting of a cluster: none, a stand-in for sacct, or slurmdbd with a database of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.slurm.daemons import Daemons, answers, program
from tests.slurm.settings import Site


def install_shim(root: Path) -> None:
    """Put the stand-in for sacct where the cluster's PATH looks first."""
    shim = root / "bin" / "sacct"
    source = (Path(__file__).parent / "sacct_shim.py").read_text()
    # The interpreter itself, not the environment's link to it: it starts faster, and any user may run it.
    shim.write_text(f"#!{os.path.realpath(sys.executable)} -IS\n{source}")
    shim.chmod(0o755)


def start_database(daemons: Daemons, site: Site) -> None:
    """Start mariadb on a socket of its own, and slurmdbd on it."""
    socket = site.root / "run" / "mysql.socket"
    _start_mariadb(daemons, socket)
    conf = site.root / "slurmdbd.conf"
    conf.write_text("\n".join(_slurmdbd_conf(site)) + "\n")
    conf.chmod(0o600)
    # slurmdbd looks for its file beside slurm.conf; libmariadb takes the socket of "localhost" from MYSQL_UNIX_PORT.
    slurm_conf = site.root / "slurm.conf"
    slurm_conf.touch()
    environment = {"MYSQL_UNIX_PORT": str(socket), "SLURM_CONF": str(slurm_conf)}
    daemons.start("slurmdbd", [program("slurmdbd"), "-D"], environment)
    daemons.wait_until("slurmdbd", lambda: answers(site.network.controller, site.dbd_port))


def enrol(root: Path, environment: dict[str, str], users: tuple[str, ...]) -> None:
    """Tell slurmdbd about the cluster, one account and its users."""
    lines = ["add cluster toy", "add account test Cluster=toy"]
    lines += [f"add user {user} Account=test Cluster=toy" for user in users]
    done = subprocess.run(
        [program("sacctmgr"), "-i", "-Q"],
        input="\n".join(lines) + "\n",
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"sacctmgr: {done.stdout}{done.stderr}")


def _start_mariadb(daemons: Daemons, socket: Path) -> None:
    data = daemons.root / "mysql"
    install = [program("mariadb-install-db"), "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
    subprocess.run(
        [*install, "--auth-root-authentication-method=normal", "--skip-name-resolve"], check=True, capture_output=True
    )
    daemons.start(
        "mariadbd",
        [
            program("mariadbd"),
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--socket={socket}",
            f"--pid-file={daemons.root}/run/mysql.pid",
            "--skip-networking",
            "--skip-log-bin",
            "--max-allowed-packet=16M",
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=8M",
            "--innodb-flush-log-at-trx-commit=0",  # nobody needs these records after a crash
            "--innodb-lock-wait-timeout=900",
        ],
    )
    daemons.wait_until("mariadbd", socket.exists)


def _slurmdbd_conf(site: Site) -> list[str]:
    return [
        "AuthType=auth/munge",
        f"AuthInfo=socket={site.munge_socket}",
        f"DbdHost={site.host}",
        f"DbdAddr={site.network.controller}",
        f"DbdPort={site.dbd_port}",
        "SlurmUser=root",
        f"LogFile={site.root}/log/slurmdbd.log",
        f"PidFile={site.root}/run/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=root",
        "StorageLoc=slurm_acct",
    ]


def missing_for_database() -> str | None:
    """Return which program accounting with a database lacks here, or None."""
    lacking = [name for name in ("slurmdbd", "mariadbd", "sacctmgr") if not shutil.which(name, path=_SEARCH)]
    return f"not installed: {', '.join(lacking)}" if lacking else None


_SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
