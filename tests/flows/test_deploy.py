"""The files of deploy/: pinned images, nothing open but the proxy, commands and settings that d3po takes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from d3po.flows.commands.line import app
from d3po.flows.server_stores import chosen_stores
from d3po_core.paths import PROJECT_ROOT
from tests.flows.test_printed_commands import parsed

DEPLOY = PROJECT_ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
RESOURCES = [
    one for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for one in yaml.safe_load_all(file.read_text())
]
VALUES = dict(line.split("=", 1) for line in (DEPLOY / "kubernetes" / "values.env").read_text().splitlines())


def pods() -> list[dict[str, Any]]:
    found = [one["spec"]["template"] for one in RESOURCES if one["kind"] == "Deployment"]
    (ray,) = [one["spec"] for one in RESOURCES if one["kind"] == "RayCluster"]
    return [*found, ray["headGroupSpec"]["template"], *(group["template"] for group in ray["workerGroupSpecs"])]


def containers() -> list[dict[str, Any]]:
    return [container for pod in pods() for container in pod["spec"]["containers"]]


def test_every_image_has_a_pinned_tag() -> None:
    images = [service["image"] for service in COMPOSE.values()] + [container["image"] for container in containers()]
    assert len(images) >= 9
    for image in images:
        assert re.search(r":(\d+\.\d+[\w.-]*|cpu)$", image), image  # d3po:cpu is built from this clone


def test_only_the_proxy_is_reachable() -> None:
    assert [name for name, service in COMPOSE.items() if "ports" in service] == ["proxy"]
    assert COMPOSE["d3po"]["network_mode"] == "service:proxy", "whose 127.0.0.1 it listens on"
    assert {name for name, one in COMPOSE.items() if "outer" in one.get("networks", ())} == {"proxy"}
    (service,) = [one for one in RESOURCES if one["kind"] == "Service"]
    opened = {port["name"] for one in containers() for port in one.get("ports", ())}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == opened == {"http", "https"}
    assert [one["name"] for one in containers() if "ports" in one] == ["proxy"]


def test_secrets_come_from_files_that_are_not_in_the_clone() -> None:
    files = [one["file"] for one in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"].values()]
    for path in ["deploy/kubernetes/secrets.env", *(f"deploy/{file.removeprefix('./')}" for file in files)]:
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=PROJECT_ROOT).returncode == 0, path


def test_settings_are_those_that_d3po_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    known = {
        name for command in typer.main.get_group(app).commands.values() for option in command.params
        for name in ([option.envvar] if isinstance(option.envvar, str) else option.envvar or [])
    }  # fmt: skip
    for environment in (COMPOSE["d3po"]["environment"], VALUES):
        assert {name for name in environment if name.startswith("D3PO_")} - {"D3PO_DOMAIN"} <= known
        stores = chosen_stores(environment["D3PO_DATABASE"], environment["D3PO_ARTIFACTS"])
        assert stores["artifacts"] == "s3://d3po/mlflow"


@pytest.mark.parametrize("script", ["serve.sh", "slurm.sh"])
def test_commands_of_scripts_are_ours(script: str) -> None:
    lines = re.findall(r"(?:^\s*|trap ')(d3po [a-z][^;'\n]*)", (DEPLOY / script).read_text(), re.M)
    assert lines
    for line in lines:
        filled_in = re.sub(r"\$\(\(.*?\)\)", "4", line.replace('"$@"', ""))
        assert "$" not in filled_in
        parsed(filled_in.strip())
    # Fields of the configuration that the script sets; they come with the engine.
    named = {name for line in lines for name in re.findall(r"(compute\.\w+)=", line)}
    assert named == ({"compute.address", "compute.processes"} if script == "slurm.sh" else set())


def test_pods_and_ray_cluster_are_valid() -> None:
    for pod in pods():
        named = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]}
        kubernetes_validate.validate(named, "1.37", strict=True)
    schema = json.loads((DEPLOY / "kubernetes" / "raycluster.schema.json").read_text())
    (ray,) = [one for one in RESOURCES if one["kind"] == "RayCluster"]
    from jsonschema import ValidationError, validate

    validate(ray, schema)
    with pytest.raises(ValidationError):
        validate({**ray, "spec": {**ray["spec"], "headGroup": {}}}, schema)
    pins = (PROJECT_ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={ray['spec']['rayVersion']}" in pins


def test_proxy_asks_for_a_login_everywhere_but_on_raters_pages_and_prefect() -> None:
    caddy = shutil.which("caddy", path=str(Path(sys.executable).parent))
    assert caddy
    environment = {**os.environ, "D3PO_DOMAIN": "d3po.test", "D3PO_OWNERS": "owners.example"}
    adapted = subprocess.run(
        [caddy, "adapt", "--config", DEPLOY / "Caddyfile"], env=environment, check=True, capture_output=True
    )
    routes = json.loads(adapted.stdout)["apps"]["http"]["servers"]["srv0"]["routes"]
    sites = {route["match"][0]["host"][0].partition(".")[0]: json.dumps(route) for route in routes}
    assert {name for name, route in sites.items() if '"http_basic"' in route} == {"judge", "mlflow"}
    assert '"path": ["/owner", "/owner/*"]' in sites["judge"]
    assert {name for name, route in sites.items() if '"status_code": 403' in route} == {"mlflow", "prefect"}
