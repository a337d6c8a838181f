"""The files under server/deploy fit the server: its ports, paths, options, exit codes and times."""

from __future__ import annotations

import asyncio
import configparser
import pathlib
from typing import Any

import httpx
import yaml

from jaxserve.config.settings import ServerConfig
from jaxserve.engine.channel import END_SECONDS
from jaxserve.serving import server_run
from jaxserve.serving.http_port.http_server import HttpServer
from jaxserve.serving.served_model import ServedModel

DEPLOY = pathlib.Path(__file__).parents[2] / "server" / "deploy"
DEFAULTS = {field.name: field.default for field in ServerConfig.__dataclass_fields__.values()}


def documents() -> list[dict[str, Any]]:
    """Everything in the Kubernetes manifests."""
    return [
        document
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] == kind]


def pod() -> dict[str, Any]:
    (deployment,) = of_kind("Deployment")
    return deployment["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    return found


def bindings() -> dict[str, Any]:
    """The settings of ServerConfig that the container is started with."""
    found = {}
    for argument in container()["args"]:
        name, _, value = argument.partition("=")
        if name.startswith("--gin.ServerConfig."):
            found[name.removeprefix("--gin.ServerConfig.")] = yaml.safe_load(value)
    return found


def test_settings_of_the_container_exist():
    assert bindings().keys() <= DEFAULTS.keys()
    assert container()["command"][-1] == "jaxserve.server"


def test_ports_are_those_of_the_server_everywhere():
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"grpc": bindings()["port"], "http": bindings()["http_port"]}
    assert ports == {"grpc": DEFAULTS["port"], "http": DEFAULTS["http_port"]}
    for service in of_kind("Service"):
        assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports


def test_probes_ask_for_paths_that_exist_and_tell_draining_from_dead():
    async def answers() -> dict[str, int]:
        server = HttpServer("127.0.0.1", 0, ServedModel("echo"))
        await server.start()
        async with httpx.AsyncClient(base_url=f"http://{server.address}") as client:
            found = {
                name: (await client.get(container()[name]["httpGet"]["path"])).status_code
                for name in ("startupProbe", "readinessProbe", "livenessProbe")
            }
        await server.stop()
        return found

    assert asyncio.run(answers()) == {"startupProbe": 503, "readinessProbe": 503, "livenessProbe": 200}
    assert {container()[name]["httpGet"]["port"] for name in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "http"
    }


def test_the_grace_period_is_longer_than_hook_drain_and_end():
    (_, pause) = container()["lifecycle"]["preStop"]["exec"]["command"]
    grace = pod()["terminationGracePeriodSeconds"]
    assert grace > float(pause) + bindings()["drain_seconds"] + END_SECONDS
    assert unit()["Service"]["TimeoutStopSec"] == "60"
    assert float(unit()["Service"]["TimeoutStopSec"]) > DEFAULTS["drain_seconds"] + END_SECONDS


def test_selectors_select_the_pods():
    (deployment,) = of_kind("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for service in of_kind("Service"):
        assert service["spec"]["selector"].items() <= labels.items()
    (budget,) = of_kind("PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    mounted = {mount["name"] for mount in container()["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod()["volumes"]}


def unit() -> configparser.ConfigParser:
    """The systemd unit."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]  names are case sensitive
    parser.read_string((DEPLOY / "jaxserve.service").read_text())
    return parser


def test_the_unit_restarts_what_failed_and_not_what_is_misconfigured():
    service = unit()["Service"]
    assert service["ExecStart"].split()[1:3] == ["-m", "jaxserve.server"]
    assert service["ExecStartPre"].split() == [*service["ExecStart"].split(), "--dry-run"]
    assert service["Restart"] == "on-failure"
    assert server_run.EXIT_FAILED == 1
    assert service["RestartPreventExitStatus"] == "2"
    assert service["KillMode"] == "mixed", "the engine's process must drain with the front end"
    assert service["CacheDirectoryMode"] == "0700"
