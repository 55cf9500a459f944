"""Bring a real SLURM up on this machine, and take it down again, in a directory of its own.

It starts munge, a private MariaDB, slurmdbd, slurmctld and a slurmd for each virtual node with fake GPUs, on free ports
of 127.0.0.1. Two partitions share the nodes: jobs in `high` preempt those in `low`, which are requeued. It touches
nothing outside the directory and uses no daemon of the machine's own. It needs root and the Debian packages slurm-wlm,
slurmdbd, munge and mariadb-server.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

import psutil

HERE = Path(__file__).parent
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
START_SECONDS = 300.0
"""Each daemon starts within seconds on an idle machine; a busy one takes longer."""
END_SECONDS = 60.0
LOWEST_PORT = 20000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True)
class Shape:
    """Nodes and limits that the cluster pretends to have."""

    nodes: int = 2
    gpus: int = 4
    """Fake GPUs a node: plain files, enough for SLURM to count."""
    max_array_size: int = 1001
    accounting: bool = True
    """True if it keeps accounts; many sites keep none, and then there is no sacct."""


class DevCluster:
    """A SLURM cluster in the directory `home`."""

    def __init__(self, home: Path, shape: Shape | None = None) -> None:
        self.home = home.absolute()
        self.shape = shape or Shape()
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def env(self) -> dict[str, str]:
        """Environment under which SLURM's programs talk to this cluster, whose GPUs no rank finds."""
        return {"SLURM_CONF": str(self.home / "slurm.conf"), "SSMSCALE_DEVICE": "cpu"}

    @property
    def node_names(self) -> list[str]:
        """n1, n2, ..."""
        return [f"n{number}" for number in range(1, self.shape.nodes + 1)]

    def up(self) -> None:
        """Start every daemon and wait until all nodes are idle; raises RuntimeError if one does not start."""
        if missing := missing_programs():
            raise RuntimeError(f"a SLURM cluster needs the programs {', '.join(missing)}; see the README")
        if os.geteuid() != 0:
            raise RuntimeError(
                "a SLURM cluster on one machine needs root: its daemons start jobs as their users"
            )
        if (self.home / "slurm.conf").exists():
            raise RuntimeError(f"{self.home}: holds a cluster already; take it down first")
        if self.home.exists() and any(self.home.iterdir()):
            raise RuntimeError(f"{self.home}: is not empty; name a directory that may be the cluster's own")
        try:
            self._write()
            self._start_munge()
            if self.shape.accounting:
                self._start_database()
                self._start("slurmdbd", "slurmdbd", "-D")
                self._wait("slurmdbd", lambda: self._answers("sacctmgr", "-n", "list", "cluster"))
            self._start("slurmctld", "slurmctld", "-D", "-c")
            self._wait("slurmctld", lambda: self._answers("scontrol", "ping"))
            for node in self.node_names:
                self.start_node(node)
            self._wait("nodes", self._all_idle)
        except BaseException:
            self._remove()
            raise

    def down(self) -> None:
        """Kill the daemons and all jobs, and remove the directory; raises RuntimeError if it holds no cluster."""
        if not (self.home / "devcluster.json").exists():
            raise RuntimeError(f"{self.home}: holds no cluster")
        self._remove()

    def _remove(self) -> None:
        _kill(self._processes())
        _kill(list(self._of_jobs()))
        shutil.rmtree(self.home, ignore_errors=True)

    def _of_jobs(self) -> Iterator[psutil.Process]:
        """Find the processes of jobs, and their shepherds, which detach from slurmd and erase their environment."""
        for process in psutil.process_iter(["name", "cwd", "environ"]):
            environment = process.info["environ"] or {}
            is_of_job = (
                environment.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURM_JOB_ID" in environment
            )
            if is_of_job or (process.info["name"], process.info["cwd"]) == ("slurmstepd", str(self.home)):
                yield process

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def stop_node(self, node: str) -> None:
        """Kill a node's slurmd, as if its machine had gone silent; its jobs may go on writing."""
        _kill(self._processes(f"slurmd-{node}"))

    def _write(self) -> None:
        for name in ("logs", "state", "spool", "gpus", "munge", "database", "pids"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o755)
        shape, (ctld, dbd, database, *ports) = self.shape, free_ports(3 + self.shape.nodes)
        devices = [self.home / "gpus" / f"gpu{number}" for number in range(shape.gpus)]
        for device in devices:
            device.symlink_to("/dev/null")  # without a device file SLURM names no GPU to jobs
        host = socket.gethostname().split(".")[0]
        gres = f" Gres=gpu:fake:{shape.gpus}" if shape.gpus else ""
        node_lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 "
            f"RealMemory=16000{gres} Feature=virtual State=UNKNOWN"
            for node, port in zip(self.node_names, ports, strict=True)
        ]
        accounts = {
            "Type": "accounting_storage/slurmdbd",
            "Host": "127.0.0.1",
            "Port": dbd,
            "Pass": self.home / "munge" / "socket",
            "TRES": "gres/gpu",
        }
        accounts = accounts if shape.accounting else {"Type": "accounting_storage/none"}
        facts = {
            "home": self.home,
            "accounting": "\n".join(f"AccountingStorage{key}={value}" for key, value in accounts.items()),
            "host": host,
            "nodes": shape.nodes,
            "node_list": f"n[1-{shape.nodes}]",
            "node_lines": "\n".join(node_lines),
            "slurmctld_port": ctld,
            "slurmdbd_port": dbd,
            "database_port": database,
            "password": secrets.token_hex(16),
            "max_array_size": shape.max_array_size,
        }
        for name in ("slurm.conf", "slurmdbd.conf"):
            text = Template((HERE / name).read_text(encoding="utf-8")).substitute(facts)
            self._write_private(name, text)
        (self.home / "slurm.conf").chmod(0o644)
        lines = [f"Name=gpu Type=fake File={device}" for device in devices]
        (self.home / "gres.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._write_private("devcluster.json", json.dumps(asdict(shape)))
        self._password, self._database_port = facts["password"], database

    def _write_private(self, name: str, text: str) -> None:
        path = self.home / name
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")

    def _start_munge(self) -> None:
        folder = self.home / "munge"
        folder.chmod(0o711)
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._start(
            "munged",
            "munged",
            "--foreground",
            "--force",
            "--num-threads=2",
            *(f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")),
            f"--socket={folder / 'socket'}",
        )
        self._wait("munged", (folder / "socket").exists)

    def _start_database(self) -> None:
        data = self.home / "database" / "data"
        # MariaDB removes files from its temporary folder when it starts, so that must not be the machine's /tmp.
        temporary = self.home / "database" / "tmp"
        temporary.mkdir()
        endpoint = self.home / "database" / "socket"
        self._run(
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--tmpdir={temporary}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
        self._start(
            "mariadbd",
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--tmpdir={temporary}",
            f"--socket={endpoint}",
            f"--pid-file={self.home / 'database' / 'pid'}",
            "--bind-address=127.0.0.1",
            f"--port={self._database_port}",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        )
        client = ("mariadb", "--no-defaults", f"--socket={endpoint}", "--user=root")
        self._wait("mariadbd", lambda: self._answers(*client, "--execute=select 1"))
        statements = (
            f"create user slurm@127.0.0.1 identified by '{self._password}'; "
            "create database slurm; grant all on slurm.* to slurm@127.0.0.1;"
        )
        self._run(*client, text=statements)

    def _start(self, name: str, *command: str) -> None:
        with (self.home / "logs" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
                cwd=self.home,
            )
        self._started.append(process)
        started = psutil.Process(process.pid).create_time()
        (self.home / "pids" / name).write_text(f"{process.pid} {started}", encoding="utf-8")

    def _processes(self, only: str | None = None) -> list[psutil.Process]:
        """Return the daemons of this cluster that run, the last started first."""
        files = sorted(self.home.glob("pids/*"), key=lambda path: -path.stat().st_mtime)
        found = []
        for path in files:
            if only not in {None, path.name}:
                continue
            pid, started = path.read_text(encoding="utf-8").split()
            try:
                process = psutil.Process(int(pid))
            except psutil.NoSuchProcess:
                continue
            if abs(process.create_time() - float(started)) < 2:
                found.append(process)
        return found

    def _all_idle(self) -> bool:
        done = self._run("sinfo", "--noheader", "--Node", "--format=%t", check=False)
        states = done.stdout.split()
        return len(states) >= self.shape.nodes and set(states) <= {"idle"}

    def _answers(self, *command: str) -> bool:
        return self._run(*command, check=False).returncode == 0

    def _run(
        self, *command: str, text: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            env=self._environment(),
            timeout=START_SECONDS,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{command[0]} ended with {done.returncode}: {done.stderr.strip() or done.stdout}"
            )
        return done

    def _environment(self) -> Mapping[str, str]:
        return {**os.environ, **self.env, "PATH": PATH}

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + START_SECONDS
        while not condition():
            has_ended = any(daemon.poll() is not None for daemon in self._started)
            if has_ended or time.monotonic() > limit:
                endings = [f"{log.name}: {_last_lines(log)}" for log in sorted(self.home.glob("logs/*"))]
                raise RuntimeError(f"{what} did not start; {'; '.join(endings)}")
            time.sleep(0.1)


def missing_programs() -> list[str]:
    """Return the programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


_CLAIMS: list[socket.socket] = []
"""A socket for each port that was given out; the kernel releases its name with this process."""


def free_ports(count: int) -> Sequence[int]:
    """Return free ports of 127.0.0.1, below those that the kernel gives out by itself.

    While this process lives, no other process that calls this function gets one of them.
    """
    try:
        first = int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32768
    found: list[int] = []
    for port in random.SystemRandom().sample(range(LOWEST_PORT, max(first, LOWEST_PORT + 1000)), k=1000):
        with socket.socket() as endpoint, contextlib.suppress(OSError):
            endpoint.bind(("127.0.0.1", port))
            claim = socket.socket(socket.AF_UNIX)
            claim.bind(f"\0ssmscale-port-{port}")
            _CLAIMS.append(claim)
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports on 127.0.0.1")


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_SECONDS)


def _last_lines(log: Path) -> str:
    return " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
