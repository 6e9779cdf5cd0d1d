"""The names that rules, dashboards, manifests and the runbook share with the code."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.server import servers

from pushforward.settings import PREFIX, Settings, load_settings

OURS = re.compile(r"\b(pushforward_\w+)(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")
OF_PROMETHEUS = {"job", "instance", "le"}
RULES = "deploy/prometheus/rules.yml"
DASHBOARD = "deploy/grafana/dashboards/pushforward.json"


def rules(checkout: Path) -> dict[str, Any]:
    groups = yaml.safe_load((checkout / RULES).read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def expressions(checkout: Path) -> Iterator[str]:
    """Everything that is asked of Prometheus."""
    yield from (rule["expr"] for rule in rules(checkout).values())
    dashboard = json.loads((checkout / DASHBOARD).read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ()))
    keda = yaml.safe_load((checkout / "deploy/kubernetes/keda/scaledobject.yaml").read_text())
    yield from (trigger["metadata"]["query"] for trigger in keda["spec"]["triggers"])


@pytest.fixture(scope="module")
def exported(checkout: Path) -> dict[str, set[str]]:
    """The labels of every metric of a server that has answered well and badly, by sample name."""
    with servers(lambda: checkout / "model_store") as start:
        server = start("--versions", "moons/1", "--max-queue-rows", "10")
        with server.client() as client:
            url = "/v1/models/moons/log_density"
            for rows, status in ((1, 200), (11, 422)):
                assert client.post(url, json={"x": [[0.0, 1.0]] * rows}).status_code == status
            text = client.get("/metrics").text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        for suffix in suffixes:
            labels[family.name + suffix] = set()
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    return labels


def test_every_metric_that_is_asked_for_is_exported(checkout: Path, exported: dict[str, set[str]]) -> None:
    asked = {name for expression in expressions(checkout) for name, _ in OURS.findall(expression)}
    assert len(asked) > 20
    assert asked <= exported.keys()


def test_every_label_that_is_asked_for_is_one_of_its_metrics(
    checkout: Path, exported: dict[str, set[str]]
) -> None:
    seen = False
    for expression in expressions(checkout):
        metrics = OURS.findall(expression)
        grouped = [name.strip() for names in GROUPING.findall(expression) for name in names.split(",")]
        for name, matchers in metrics:
            matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
            for label in {*matched, *grouped} - OF_PROMETHEUS:
                if exported[name]:  # a counter that has not counted yet shows no labels
                    assert label in exported[name], f"{name} has no label {label}: {expression}"
                    seen = True
    assert seen


def test_every_alert_has_a_section_of_the_runbook_and_an_example(checkout: Path) -> None:
    alerts = rules(checkout)
    sections = set(re.findall(r"^### (\w+)", (checkout / "deploy/RUNBOOK.md").read_text(), re.MULTILINE))
    cases = yaml.safe_load((checkout / "deploy/prometheus/rules.test.yml").read_text())["tests"]
    fired = {
        test["alertname"] for case in cases for test in case.get("alert_rule_test", ()) if test["exp_alerts"]
    }
    assert sections == alerts.keys() == fired
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook"] == f"deploy/RUNBOOK.md#{name.lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}


def compose(checkout: Path) -> dict[str, Any]:
    return yaml.safe_load((checkout / "docker-compose.yml").read_text())


def kubernetes(checkout: Path, name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((checkout / "deploy/kubernetes/base" / name).read_text()))


def test_every_setting_that_a_deployment_makes_is_one(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (generator,) = kubernetes(checkout, "kustomization.yaml")[0]["configMapGenerator"]
    settings = [dict(line.split("=", 1) for line in generator["literals"])]
    examples = re.findall(rf"^#?({PREFIX}\w+)=(.*)$", (checkout / ".env.example").read_text(), re.MULTILINE)
    settings.append(dict(examples))
    for service in compose(checkout)["services"].values():
        ours = {
            name: value for name, value in service.get("environment", {}).items() if name.startswith(PREFIX)
        }
        settings.append({name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in ours.items()})
    assert sum(map(bool, settings)) == 5  # Kubernetes, the example, and three services
    for one in settings:
        with monkeypatch.context() as patch:
            for name in Settings.model_fields:
                patch.delenv(PREFIX + name.upper(), raising=False)
            for name, value in one.items():
                patch.setenv(name, value)
            load_settings()


def test_nobody_is_killed_while_it_drains(checkout: Path) -> None:
    for name in ("api", "worker", "worker-gpu"):
        service = compose(checkout)["services"][name]
        drain_s = float(service["environment"]["PUSHFORWARD_DRAIN_S"])
        assert float(service["stop_grace_period"].removesuffix("s")) >= drain_s + 5
    (generator,) = kubernetes(checkout, "kustomization.yaml")[0]["configMapGenerator"]
    drain_s = float(dict(line.split("=", 1) for line in generator["literals"])["PUSHFORWARD_DRAIN_S"])
    for name in ("api.yaml", "worker.yaml"):
        pod = kubernetes(checkout, name)[0]["spec"]["template"]["spec"]
        hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {"exec": {"command": ["sleep", "0"]}})
        pause_s = float(hook["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + 5


def test_the_example_of_variables_has_all_that_compose_asks_for(checkout: Path) -> None:
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", (checkout / "docker-compose.yml").read_text()))
    given = set(re.findall(r"^#?(\w+)=", (checkout / ".env.example").read_text(), re.MULTILINE))
    assert asked <= given
