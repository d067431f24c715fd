"""Programs that no Python package has, each built or installed once into the cache; most are of Go.

python -m deployment.tools [NAME ...] builds them and says which cannot be had, and why.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from deployment.cache import CACHE, Unavailable

BUILD_S: Final = 3_600

KUBERNETES: Final = "1.37.2"
OTELCOL: Final = "0.165.0"
STABLE_OTELCOL: Final = "1.71.0"


@dataclass(frozen=True, slots=True)
class Tool:
    """A program of others that tests need, and how it is built.

    Args:
        version: of the module, without the v.
        build: into an existing folder, which then holds the programs.
    """

    version: str
    build: Callable[[Path], None]


def path(name: str, program: str | None = None) -> Path:
    """Where a program is.

    Args:
        program: when it has another name than its tool.

    Raises:
        Unavailable: it was not built yet.
    """
    found = _folder(name) / (program or name)
    if not found.exists():
        raise Unavailable(f"there is no {name} in the cache; `make test-deploy` builds it")
    return found


def ensure(name: str) -> None:
    """Build it unless that was done.

    Raises:
        Unavailable: there is no Go, or a module cannot be had.
    """
    folder = _folder(name)
    if folder.exists():
        return
    print(f"==> {name} {TOOLS[name].version}, in {folder} (minutes, the first time)", flush=True)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    TOOLS[name].build(new)
    new.rename(folder)


def _folder(name: str) -> Path:
    return CACHE / f"{name}-{TOOLS[name].version}"


def _helm(into: Path) -> None:
    with tempfile.TemporaryDirectory() as module:
        _build(Path(module), into, f"helm.sh/helm/v4/cmd/helm@v{TOOLS['helm'].version}")


def _kubernetes(into: Path) -> None:
    """Its module takes the modules beside it from its own folder, which others have to name."""
    with tempfile.TemporaryDirectory() as name:
        module = Path(name)
        (module / "go.mod").write_text("module tools\n")
        found = json.loads(_run(["go", "mod", "download", "-json", f"k8s.io/kubernetes@v{KUBERNETES}"], module))
        staged = re.findall(r"^\s*(k8s\.io/[a-z-]+) => \./staging/", Path(found["GoMod"]).read_text(), re.MULTILINE)
        beside = f"v0.{KUBERNETES.partition('.')[2]}"
        _run(["go", "mod", "edit", *(f"-replace={each}={each}@{beside}" for each in staged)], module)
        programs = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
        major, minor, _ = KUBERNETES.split(".")
        # Its own build sets them, too: clients ask which version they talk to.
        told = {"gitVersion": f"v{KUBERNETES}", "gitMajor": major, "gitMinor": minor}
        _build(
            module,
            into,
            *(f"k8s.io/kubernetes/cmd/{program}@v{KUBERNETES}" for program in programs),
            variables={f"k8s.io/component-base/version.{name}": value for name, value in told.items()},
        )


def _kwok(into: Path) -> None:
    """With its stages: what it makes nodes and pods that do not exist go through."""
    with tempfile.TemporaryDirectory() as name:
        module = Path(name)
        _build(module, into, f"sigs.k8s.io/kwok/cmd/kwok@v{TOOLS['kwok'].version}")
        source = Path(_run(["go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok"], module).strip())
        for stage in ("node/fast", "node/heartbeat", "pod/fast"):
            for each in (source / "kustomize/stage" / stage).glob("*.yaml"):
                if each.name != "kustomization.yaml":
                    (into / f"{stage.replace('/', '-')}-{each.name}").write_bytes(each.read_bytes())


def _miniflare(into: Path) -> None:
    """Cloudflare's runtime for workers, with what runs it."""
    npm = ["npm", "install", "--prefix", str(into), "--no-audit", "--no-fund", "--ignore-scripts"]
    _run([*npm, f"miniflare@{TOOLS['miniflare'].version}"], into)


def _envoy_gateway(into: Path) -> None:
    """With its charts: of itself, and of the kinds of objects that it reads."""
    with tempfile.TemporaryDirectory() as name:
        module = Path(name)
        source = "github.com/envoyproxy/gateway"
        _build(module, into, f"{source}/cmd/envoy-gateway@v{TOOLS['envoy-gateway'].version}")
        folder = Path(_run(["go", "list", "-m", "-f", "{{.Dir}}", source], module).strip())
        shutil.copytree(folder / "charts", into / "charts", copy_function=shutil.copyfile)


def _istio(into: Path) -> None:
    """istiod, with its chart and the kinds of objects that it reads."""
    with tempfile.TemporaryDirectory() as name:
        module = Path(name)
        _build(module, into, f"istio.io/istio/pilot/cmd/pilot-discovery@v{TOOLS['istio'].version}")
        folder = (
            Path(_run(["go", "list", "-m", "-f", "{{.Dir}}", "istio.io/istio"], module).strip()) / "manifests/charts"
        )
        shutil.copytree(folder / "istio-control/istio-discovery", into / "istiod", copy_function=shutil.copyfile)
        shutil.copyfile(folder / "base/files/crd-all.gen.yaml", into / "crds.yaml")


def _collector(into: Path) -> None:
    """What deploy/otel/collector.yaml needs, and no more."""
    core = "go.opentelemetry.io/collector"
    parts = {
        "receivers": [f"{core}/receiver/otlpreceiver"],
        "processors": [f"{core}/processor/batchprocessor", f"{core}/processor/memorylimiterprocessor"],
        "exporters": [f"{core}/exporter/debugexporter", f"{core}/exporter/otlpexporter"],
    }
    config = {
        "dist": {
            "name": "otelcol",
            "output_path": "./out",
            "module": "tools/otelcol",
            "go": shutil.which("go", path=_go_path()),
        },
        **{kind: [{"gomod": f"{module} v{OTELCOL}"} for module in modules] for kind, modules in parts.items()},
        # The file it is given, and the environment: its default.
        "providers": [
            {"gomod": f"{core}/confmap/provider/{each}provider v{STABLE_OTELCOL}"} for each in ("file", "env")
        ],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _build(folder, folder, f"{core}/cmd/builder@v{OTELCOL}")
        (folder / "builder.json").write_text(json.dumps(config))
        _run([str(folder / "builder"), "--config", "builder.json"], folder)
        shutil.copy2(folder / "out/otelcol", into / "otelcol")


def _jaeger(into: Path) -> None:
    with tempfile.TemporaryDirectory() as module:
        _build(Path(module), into, f"github.com/jaegertracing/jaeger/cmd/jaeger@v{TOOLS['jaeger'].version}")


def _actionlint(into: Path) -> None:
    with tempfile.TemporaryDirectory() as module:
        _build(Path(module), into, f"github.com/rhysd/actionlint/cmd/actionlint@v{TOOLS['actionlint'].version}")


def _opentofu(into: Path) -> None:
    """It is written against a fork, which others have to name."""
    with tempfile.TemporaryDirectory() as name:
        module = Path(name)
        fork = "github.com/opentofu/hcl/v2@v2.20.2-0.20251021132045-587d123c2828"
        (module / "go.mod").write_text("module tools\n")
        _run(["go", "mod", "edit", f"-replace=github.com/hashicorp/hcl/v2={fork}"], module)
        _build(module, into, f"github.com/opentofu/opentofu/cmd/tofu@v{TOOLS['opentofu'].version}")


def _provider(name: str, commit: str) -> Callable[[Path], None]:
    """Of Terraform and OpenTofu, where they look for what they do not fetch.

    Args:
        commit: of the version: their modules have versions that Go does not take.
    """
    package = f"github.com/hashicorp/terraform-provider-{name}"

    def build(into: Path) -> None:
        with tempfile.TemporaryDirectory() as module:
            _build(Path(module), _mirrored(into, name), f"{package}@{commit}")

    return build


def _mirrored(into: Path, name: str) -> Path:
    system = f"{platform.system().lower()}_{'arm64' if platform.machine() == 'aarch64' else 'amd64'}"
    folder = into / "registry.opentofu.org/hashicorp" / name / TOOLS[f"provider-{name}"].version / system
    folder.mkdir(parents=True)
    return folder


AWS_SERVICES: Final = frozenset(("ec2", "eks", "iam", "route53", "sts"))


def _aws_provider(into: Path) -> None:
    """The real one, but only with the services that deploy/terraform uses: all of them take hours to compile."""
    source = "github.com/hashicorp/terraform-provider-aws"
    with tempfile.TemporaryDirectory() as name:
        module = Path(name)
        (module / "go.mod").write_text("module tools\n")
        found = json.loads(_run(["go", "mod", "download", "-json", f"{source}@{AWS_COMMIT}"], module))
        whole, part = Path(found["Dir"]), module / "aws"
        ignored = shutil.ignore_patterns("*_test.go", "acctest", "website", "docs", "examples", ".*")
        shutil.copytree(whole, part, ignore=ignored, copy_function=shutil.copyfile)
        _run(["chmod", "-R", "u+w", str(part)], module)
        services = part / "internal/service"
        needed: set[str] = set()
        more = set(AWS_SERVICES)
        while more:
            needed |= more
            texts = "".join(file.read_text() for each in more for file in (services / each).rglob("*.go"))
            more = set(re.findall(rf'"{source}/internal/service/(\w+)', texts)) - needed
        for folder in services.iterdir():
            if folder.is_dir() and folder.name not in needed:
                shutil.rmtree(folder)
        # Whatever is embedded has to be there.
        (services / "ec2/smarterr.hcl").touch()
        packages = part / "internal/provider/sdkv2/service_packages_gen.go"
        lines = packages.read_text().splitlines(keepends=True)
        other = re.compile(r'internal/service/(\w+)"|^\t\t(\w+)\.ServicePackage')
        packages.write_text(
            "".join(line for line in lines if not (of := other.search(line)) or (of[1] or of[2]) in AWS_SERVICES)
        )
        clients = part / "internal/conns/awsclient_gen.go"
        sdk = "github.com/aws/aws-sdk-go-v2/service"
        used = set(
            re.findall(rf'"{sdk}/(\w+)"', "".join(file.read_text() for file in part.rglob("*.go") if file != clients))
        )
        text = clients.read_text()
        for client in set(re.findall(rf'"{sdk}/(\w+)"', text)) - used:
            text = text.replace(f'\t"{sdk}/{client}"\n', "")
            made = rf"func \(c \*AWSClient\) \w+\(ctx context\.Context\) \*{client}\.Client \{{\n.*?\n\}}\n"
            text = re.sub(made, "", text, flags=re.DOTALL)
        clients.write_text(text)
        _run(
            [
                "go",
                "build",
                "-mod=mod",
                "-trimpath",
                "-buildvcs=false",
                "-ldflags=-s -w",
                f"-o={_mirrored(into, 'aws')}/",
                ".",
            ],
            part,
        )


AWS_COMMIT: Final = "v1.60.1-0.20260602190131-5f2286d6d836"
"""6.47.1, and what came in the days after."""


TOOLS: Final[Mapping[str, Tool]] = {
    "helm": Tool("4.3.1", _helm),
    "otelcol": Tool(OTELCOL, _collector),
    "actionlint": Tool("1.7.12", _actionlint),
    "jaeger": Tool("1.76.0", _jaeger),
    "kubernetes": Tool(KUBERNETES, _kubernetes),
    "miniflare": Tool("4.20260426.0", _miniflare),
    "kwok": Tool("0.8.0", _kwok),
    "envoy-gateway": Tool("1.9.1", _envoy_gateway),
    "opentofu": Tool("1.12.6", _opentofu),
    "provider-tls": Tool("4.2.1", _provider("tls", "v1.2.1-0.20260819085117-d044ca7c6f52")),
    "provider-kubernetes": Tool("3.2.1", _provider("kubernetes", "v1.13.4-0.20260821094251-3a33fb6cc605")),
    "provider-helm": Tool("3.1.2", _provider("helm", "ecffae07748ea9e2e99660e5ad3f852a12fbc5fc")),
    "provider-aws": Tool("6.47.1", _aws_provider),
    # The newest one whose modules can be had by their versions alone.
    "istio": Tool("0.0.0-20260827124520-eed52ebb66ad", _istio),
}


def _build(module: Path, into: Path, *packages: str, variables: Mapping[str, str] = MappingProxyType({})) -> None:
    """By a module of its own: `go install` refuses modules that replace others.

    Args:
        variables: of packages, which the linker sets.
    """
    if not (module / "go.mod").exists():
        (module / "go.mod").write_text("module tools\n")
    _run(["go", "get", "-tool", *packages], module)
    names = [package.partition("@")[0] for package in packages]
    flags = " ".join(["-s", "-w", *(f"-X={name}={value}" for name, value in variables.items())])
    _run(["go", "build", "-trimpath", "-buildvcs=false", f"-ldflags={flags}", "-o", f"{into}/", *names], module)


def _run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": _go_path(), "CGO_ENABLED": "0"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True, timeout=BUILD_S
        )
    except FileNotFoundError as error:
        raise Unavailable(f"{'Node.js' if command[0] == 'npm' else 'Go'} is not installed") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no output"]
        raise Unavailable(f"{' '.join(command[:3])}: {lines[-1].strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(command[:3])} took more than {BUILD_S} s") from error
    return done.stdout


def _go_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/go/bin"


def main(names: list[str]) -> None:
    for name in names or TOOLS:
        try:
            ensure(name)
        except Unavailable as unavailable:
            print(f"    {name} cannot be had: {unavailable}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
