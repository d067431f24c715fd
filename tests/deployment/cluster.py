"""A Kubernetes API with everything but containers: etcd, API server, controllers and scheduler, and nodes of kwok's, on
which pods become ready though nothing runs in them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from deployment import tools
from deployment.cache import Unavailable

HOST: Final = "127.0.0.1"
TOKEN: Final = "administrator"
READY_S: Final = 180.0

ZONES: Final = {"node-1": "us-east-1a", "node-2": "us-east-1b"}
REGION: Final = "us-east-1"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Kubernetes API without machines, and how to reach it.

    Args:
        kubeconfig: of somebody who may do everything.
        port: the API server's.
    """

    kubeconfig: Path
    port: int
    authority: Path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints.

        Raises:
            AssertionError: it failed; with what it said.
        """
        command = [str(Path(sys.executable).with_name("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "--output=json"))
        return found


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A Kubernetes API for as long as the context lasts: etcd, the API server, its controllers, and kwok for nodes.

    Args:
        folder: an empty one, for its data and logs.

    Raises:
        Unavailable: a program is missing, or one did not start.
    """
    etcd = shutil.which("etcd")
    if etcd is None:
        raise Unavailable("there is no etcd (Debian: etcd-server)")
    programs = [tools.path("kubernetes", f"kube-{name}") for name in ("apiserver", "controller-manager", "scheduler")]
    kwok = tools.path("kwok")
    _write_key(folder / "accounts")
    (folder / "tokens.csv").write_text(f"{TOKEN},administrator,1,system:masters\n")
    client, peer, port = free_port(), free_port(), free_port()
    running = Cluster(_write_kubeconfig(folder, port), port, folder / "certificates/apiserver.crt")
    apiserver, manager, scheduler = map(str, programs)
    with ExitStack() as processes:

        def start(program: str, *options: str) -> None:
            processes.enter_context(_process([program, *options], folder / f"{Path(program).name}.log"))

        start(
            etcd,
            f"--data-dir={folder}/etcd",
            f"--listen-client-urls=http://{HOST}:{client}",
            f"--advertise-client-urls=http://{HOST}:{client}",
            f"--listen-peer-urls=http://{HOST}:{peer}",
            f"--initial-advertise-peer-urls=http://{HOST}:{peer}",
            f"--initial-cluster=default=http://{HOST}:{peer}",
            "--unsafe-no-fsync",
        )
        start(
            apiserver,
            f"--etcd-servers=http://{HOST}:{client}",
            f"--bind-address={HOST}",
            f"--secure-port={port}",
            f"--cert-dir={folder}/certificates",
            f"--token-auth-file={folder}/tokens.csv",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={folder}/accounts.key",
            f"--service-account-key-file={folder}/accounts.pub",
        )
        _wait_for(running, folder, "get", "--raw", "/readyz")
        common = (f"--kubeconfig={running.kubeconfig}", "--leader-elect=false", f"--bind-address={HOST}")
        start(
            manager,
            *common,
            f"--secure-port={free_port()}",
            f"--service-account-private-key-file={folder}/accounts.key",
            f"--root-ca-file={running.authority}",
        )
        start(scheduler, *common, f"--secure-port={free_port()}")
        stages = [f"--config={each}" for each in sorted(kwok.parent.glob("*.yaml"))]
        start(
            str(kwok),
            f"--kubeconfig={running.kubeconfig}",
            "--manage-all-nodes=true",
            f"--server-address={HOST}:{free_port()}",
            *stages,
        )
        running.kubectl(
            "apply", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": _nodes()})
        )
        _wait_for(running, folder, "wait", "--for=condition=Ready", "node", "--all", "--timeout=60s")
        _wait_for(running, folder, "get", "serviceaccount", "default")
        yield running


def crd(plural: str, kind: str, group: str) -> dict[str, Any]:
    """Of objects that are taken as they are."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}],
        },
    }


def _nodes() -> list[dict[str, Any]]:
    room = {"cpu": "32", "memory": "256Gi", "pods": "110"}
    return [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "labels": {
                    "kubernetes.io/hostname": name,
                    "topology.kubernetes.io/region": REGION,
                    "topology.kubernetes.io/zone": zone,
                },
            },
            "status": {"allocatable": room, "capacity": room},
        }
        for name, zone in ZONES.items()
    ]


def _wait_for(running: Cluster, folder: Path, *arguments: str) -> None:
    ends_at = time.monotonic() + READY_S
    while True:
        try:
            running.kubectl(*arguments)
        except AssertionError as error:
            if time.monotonic() > ends_at:
                last = {log.stem: log.read_text().strip().splitlines()[-1:] for log in folder.glob("*.log")}
                raise Unavailable(f"the Kubernetes API did not come up: {error}; {last}") from None
            time.sleep(0.2)
        else:
            return


@contextmanager
def _process(command: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "HOME": str(log.parent)})
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _write_kubeconfig(folder: Path, port: int) -> Path:
    authority = str(folder / "certificates/apiserver.crt")
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "it", "cluster": {"server": f"https://{HOST}:{port}", "certificate-authority": authority}}
        ],
        "users": [{"name": "it", "user": {"token": TOKEN}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "current-context": "it",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    return path


def _write_key(stem: Path) -> None:
    """It signs the tokens of service accounts."""
    key = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    stem.with_suffix(".key").write_bytes(private)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    stem.with_suffix(".pub").write_bytes(public)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
