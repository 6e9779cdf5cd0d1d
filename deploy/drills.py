"""Bring the whole deployment up, break it in the ways that it must survive, and take it down.

    make deploy-check                         everything; needs a Docker Engine with Compose v2
    make deploy-check ARGS="--keep answers"   the drills that are named, and leave it running

The project has a name, passwords and ports of its own, so that it may run beside another. Each drill says
what it found, and the first that does not hold ends the run with status 1. Only the standard library is
needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPLICAS = {"api": 2, "worker": 2}
PATIENCE_S = 120  # for things that take a moment, on a machine that may be very busy
QUESTION = ("/v1/models/moons/log_density", {"x": [[0.0, 1.0], [0.5, 0.25]]})
ANSWER = [0.33848, -4.16374]  # as the README has it


class Unexpected(Exception):
    """Something is not as it must be."""


def expect(holds: object, what: str) -> None:
    if not holds:
        raise Unexpected(what)


def until(holds: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait until something holds; returns the seconds that it took."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > patience_s:
            raise Unexpected(f"not within {patience_s:.0f} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - begin


KEY: dict[str, str] = {}  # what every request shows


def fetch(url: str, body: Any = None, timeout_s: float = 35) -> tuple[int, Any, dict[str, str]]:
    """Status, content and headers of an answer.

    Raises:
        OSError: when there is none.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **KEY})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            status, text, headers = answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        status, text, headers = error.code, error.read(), error.headers
    except (urllib.error.URLError, OSError) as error:
        raise OSError(str(error)) from None
    return (
        status,
        json.loads(text) if "json" in headers.get("content-type", "") else text.decode(),
        dict(headers),
    )


class Stack:
    """The containers, by the names of their services."""

    def compose(self, *arguments: str) -> str:
        return self._run("docker", "compose", "--project-directory", str(ROOT), *arguments)

    def docker(self, *arguments: str) -> str:
        return self._run("docker", *arguments)

    def _run(self, *command: str) -> str:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        expect(
            run.returncode == 0, f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout}{run.stderr}"
        )
        return run.stdout

    def containers(self, service: str) -> list[str]:
        return sorted(self.compose("ps", "--all", "--quiet", service).split())

    def inspect(self, container: str) -> dict[str, Any]:
        return json.loads(self.docker("inspect", container))[0]  # type: ignore[no-any-return]

    def health(self, container: str) -> str:
        state = self.inspect(container)["State"]
        return str(state.get("Health", {}).get("Status", state["Status"]))

    def wait_healthy(self, container: str) -> float:
        return until(lambda: self.health(container) == "healthy", f"{container[:12]} is healthy")

    def urls(self) -> list[str]:
        """The addresses of the apis that run."""
        found = []
        for container in self.containers("api"):
            bindings = self.inspect(container)["NetworkSettings"]["Ports"].get("8000/tcp") or []
            found += [f"http://{one['HostIp']}:{one['HostPort']}" for one in bindings]
        return found

    def port(self, service: str, port: int) -> str:
        return "http://" + self.compose("port", service, str(port)).strip()

    def status(self, url: str, path: str = "/health/ready") -> int:
        """0 when nobody answers."""
        try:
            return fetch(url + path)[0]
        except OSError:
            return 0

    def wait_ready(self) -> float:
        return until(lambda: all(self.status(url) == 200 for url in self.urls()), "every api is ready")


class Traffic:
    """Clients that ask the same question again and again, and know the answer.

    As a proxy would, they go to another api when one does not answer, which is safe: equal questions have
    equal answers.
    """

    def __init__(self, stack: Stack, clients: int = 4) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._urls = stack.urls()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def _ask(self, number: int) -> None:
        path, body = QUESTION
        while not self._end.is_set():
            for attempt in range(20):
                url = self._urls[(number + attempt) % len(self._urls)]
                try:
                    status, content, headers = fetch(url + path, body)
                except OSError:
                    self.counts["tried elsewhere"] += 1
                    time.sleep(0.1)
                    continue
                break
            else:
                self.wrong.append("no api answers")
                continue
            number += 1
            if status == 200 and near(content["log_density"], ANSWER):
                self.counts["answered"] += 1
            elif status == 503 and "Retry-After" in {name.title() for name in headers}:
                self.counts["refused"] += 1
                time.sleep(0.1)
            else:
                self.wrong.append(f"{status}: {content}")

    def follow(self, stack: Stack) -> None:
        """Take the addresses as they are now."""
        self._urls = stack.urls()

    @contextmanager
    def flowing(self, may_refuse: bool = False) -> Iterator[Traffic]:
        """Clients ask while the block runs; afterwards every answer must have been the right one."""
        for thread in self._threads:
            thread.start()
        try:
            until(lambda: self.counts["answered"] > 20, "answers arrive")
            yield self
            before = self.counts["answered"]
            until(lambda: self.counts["answered"] > before + 20, "answers arrive afterwards")
        finally:
            self._end.set()
            for thread in self._threads:
                thread.join()
        expect(not self.wrong, f"{len(self.wrong)} wrong answers, such as {self.wrong[:1]}")
        expect(may_refuse or not self.counts["refused"], f"{self.counts['refused']} requests were refused")

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))


def near(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(
        one is not None and math.isclose(one, other, abs_tol=1e-3)
        for one, other in zip(left, right, strict=True)
    )


# ------------------------------------------------------------------------------------------------ drills


def hardened(stack: Stack) -> str:
    """No container runs as root, changes its image, has capabilities, or is without limits."""
    services = stack.compose("ps", "--services").split()
    for service in services:
        for container in stack.containers(service):
            told = stack.inspect(container)
            host = told["HostConfig"]
            expect(told["Config"]["User"].split(":")[0] not in ("", "0", "root"), f"{service} runs as root")
            expect(host["ReadonlyRootfs"], f"{service} can change its image")
            expect(host["CapDrop"] == ["ALL"], f"{service} has capabilities")
            expect("no-new-privileges:true" in host["SecurityOpt"], f"{service} may gain privileges")
            expect(host["Memory"] and host["NanoCpus"] and host["PidsLimit"], f"{service} has no limits")
            expect(host["LogConfig"]["Config"].get("max-size"), f"{service} may fill the disk with its log")
            expect(told["RestartCount"] == 0, f"{service} was restarted {told['RestartCount']} times")
    return f"{len(services)} services"


def keys(stack: Stack) -> str:
    """Who has no key is refused; a key opens every api, until it is revoked."""
    made = ("exec", "--no-TTY", "api", "pushforward", "keys")
    token = stack.compose(*made, "create", "--name", "guest").strip()

    def statuses() -> set[int]:
        return {fetch(url + "/v1/models")[0] for url in stack.urls()}

    mine = KEY.pop("Authorization")
    try:
        expect(statuses() == {401}, f"without a key: {statuses()}")
        KEY["Authorization"] = f"Bearer {token}"
        until(lambda: statuses() == {200}, "the new key opens every api", 10)
        expect(fetch(stack.urls()[0] + "/metrics")[0] == 404, "the metrics are on the port for clients")
        stack.compose(*made, "revoke", token)
        until(lambda: statuses() == {401}, "the revoked key opens no api", 10)
    finally:
        KEY["Authorization"] = mine
    return "made, used, revoked"


def answers(stack: Stack) -> str:
    """Every api gives the answers of every model, and the same ones."""
    urls = stack.urls()
    expect(len(urls) == REPLICAS["api"], f"{len(urls)} apis have an address")
    status, listed, _ = fetch(urls[0] + "/v1/models")
    expect(status == 200, f"the list of models: {status} {listed}")
    names = [model["name"] for model in listed["models"]]
    expect("moons" in names, f"the models are {names}")
    for name in names:
        context = next(one["context_features"] for one in listed["models"] if one["name"] == name)
        body: dict[str, Any] = {"n": 3, "seed": 7} | ({"context": [[0.0]] * 3} if context else {})
        told = [fetch(f"{url}/v1/models/{name}/sample", body) for url in urls]
        expect(all(status == 200 for status, _, _ in told), f"sampling from {name}: {told[0]}")
        points = [content["x"] for _, content, _ in told]
        expect(points[0] == points[1] and len(points[0]) == 3, f"samples of {name} differ: {points}")
    for url in urls:
        status, content, _ = fetch(url + QUESTION[0], QUESTION[1])
        expect(status == 200 and near(content["log_density"], ANSWER), f"{url}: {content}")
    return f"{len(names)} models through {len(urls)} apis"


def watched(stack: Stack) -> str:
    """Prometheus finds every replica, knows what rules and dashboard ask for, and raises no alarm."""
    prometheus = stack.port("prometheus", 9090)

    def ask(query: str) -> list[Any]:
        status, content, _ = fetch(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
        expect(status == 200, f"{query}: {content}")
        return content["data"]["result"]  # type: ignore[no-any-return]

    wanted = {
        "pushforward-api": REPLICAS["api"],
        "pushforward-worker": REPLICAS["worker"],
        "redis": 1,
        "prometheus": 1,
    }

    def up() -> dict[str, int]:
        return {one["metric"]["job"]: int(one["value"][1]) for one in ask("sum by (job) (up)")}

    until(lambda: up() == wanted, "Prometheus reaches every replica")
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/pushforward.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    for expression in asked:
        ask(expression.replace("$__rate_interval", "1m"))
    for file in ("deploy/prometheus/rules.yml", "deploy/grafana/dashboards/pushforward.json"):
        for name in set(re.findall(r"\bredis_\w+", (ROOT / file).read_text())):
            until(partial(ask, name), f"Prometheus has {name}", 30)
    expect(not ask('ALERTS{severity="page"}'), f"alarms: {ask('ALERTS')}")
    return f"{sum(wanted.values())} targets, {len(asked)} panels"


def redis_away(stack: Stack) -> str:
    """Without Redis the apis live, are not ready, refuse at once, and are well again when it is back."""
    (redis,) = stack.containers("redis")
    stack.docker("stop", redis)
    try:
        noticed = until(
            lambda: all(stack.status(url) == 503 for url in stack.urls()),
            "every api says that it is not ready",
        )
        for url in stack.urls():
            expect(stack.status(url, "/health/live") == 200, f"{url} is alive")
            begin = time.monotonic()
            status, content, headers = fetch(url + QUESTION[0], QUESTION[1])
            waited = time.monotonic() - begin
            expect(status == 503, f"{url} answers {status} without Redis: {content}")
            expect(
                "retry-after" in {name.lower() for name in headers}, f"{url} does not say when to try again"
            )
            expect(waited < 10, f"{url} took {waited:.1f} s to refuse")
    finally:
        stack.docker("start", redis)
    recovered = stack.wait_ready()
    answers(stack)
    return f"noticed after {noticed:.1f} s, ready again {recovered:.1f} s after its start"


def engine_killed(stack: Stack) -> str:
    """The process that solves is killed within its container, and no client notices."""
    worker = stack.containers("worker")[0]
    with Traffic(stack).flowing() as traffic:
        stack.docker("exec", worker, "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")
        time.sleep(5)
    stack.wait_healthy(worker)
    return str(traffic)


def container_killed(stack: Stack) -> str:
    """A worker, then an api, is lost with its container, and started again; the others go on."""
    with Traffic(stack).flowing() as traffic:
        for service in REPLICAS:
            container = stack.containers(service)[-1]
            stack.docker("kill", container)
            time.sleep(5)
            stack.docker("start", container)
            stack.wait_healthy(container)
            traffic.follow(stack)
    return str(traffic)


def rolling_restart(stack: Stack) -> str:
    """Every api and worker is restarted, one after the other, and no client notices; then Redis."""
    with Traffic(stack).flowing() as traffic:
        for service in REPLICAS:
            for container in stack.containers(service):
                restart(stack, container, service)
                traffic.follow(stack)
    with Traffic(stack).flowing(may_refuse=True) as beside:
        (redis,) = stack.containers("redis")
        restart(stack, redis, "redis")
        stack.wait_ready()
    return f"{traffic}; beside Redis: {beside}"


def restart(stack: Stack, container: str, service: str) -> None:
    stack.docker("stop", container)
    code = stack.inspect(container)["State"]["ExitCode"]
    expect(code == 0, f"{service} ended with {code} on SIGTERM")
    stack.docker("start", container)
    stack.wait_healthy(container)


def stopped(stack: Stack) -> str:
    """Everything ends by itself when it is told to."""
    begin = time.monotonic()
    stack.compose("stop")
    codes = {
        service: [stack.inspect(one)["State"]["ExitCode"] for one in stack.containers(service)]
        for service in stack.compose("ps", "--all", "--services").split()
    }
    expect(all(not any(codes[service]) for service in (*REPLICAS, "redis")), f"exit statuses: {codes}")
    expect(all(137 not in one for one in codes.values()), f"had to be killed: {codes}")
    return f"{time.monotonic() - begin:.1f} s"


DRILLS = [
    hardened,
    keys,
    answers,
    watched,
    redis_away,
    engine_killed,
    container_killed,
    rolling_restart,
    stopped,
]


# ------------------------------------------------------------------------------------------------ the run


def started(stack: Stack) -> Iterator[str]:
    """What there is to know of images and of the time that containers took to be well."""
    well: dict[str, float] = {}
    for line in stack.docker(
        "events", "--since", "1h", "--until", "0s", "--filter", "event=health_status", "--format", "json"
    ).splitlines():
        event = json.loads(line)
        if event["Action"].endswith(": healthy"):
            well.setdefault(event["Actor"]["ID"], event["timeNano"] / 1e9)
    for service in stack.compose("ps", "--services").split():
        for container in stack.containers(service):
            told = stack.inspect(container)
            size = json.loads(stack.docker("image", "inspect", told["Image"]))[0]["Size"]
            text = f"{service}: image {size / 1e6:.0f} MB"
            if container in well:
                text += f", well {well[container] - moment(told['State']['StartedAt']):.1f} s after its start"
            memory = stack.docker("stats", "--no-stream", "--format", "{{.MemUsage}}", container)
            yield f"{text}, {memory.split('/')[0].strip()} of memory"


def moment(text: str) -> float:
    """Docker tells nanoseconds, which Python does not read."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text).replace("Z", "+00:00")).timestamp()


def main() -> int:
    names = [drill.__name__ for drill in DRILLS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("drills", nargs="*", metavar="drill", help=f"{', '.join(names)}; all unless named")
    parser.add_argument("--keep", action="store_true", help="leave everything running")
    arguments = parser.parse_args()
    unknown = set(arguments.drills) - set(names)
    if unknown:
        parser.error(f"there is no drill {', '.join(sorted(unknown))}")
    private = Path(tempfile.mkdtemp(prefix="pushforward-"))
    os.environ |= {
        "COMPOSE_PROJECT_NAME": "pushforward-check",
        "MODEL_STORE": "./model_store",
        "PRIVATE_FOLDER": str(private),
        "API_PORTS": "18000-18009",
        "PROMETHEUS_PORT": "19090",
        "GRAFANA_PORT": "13000",
    }
    stack, ok = Stack(), True
    try:
        subprocess.run([ROOT / "deploy/make-secrets", str(private)], check=True)
        stack.compose("build")
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")  # what --keep left
        begin = time.monotonic()
        scale = [word for service, count in REPLICAS.items() for word in ("--scale", f"{service}={count}")]
        stack.compose("up", "--detach", "--wait", "--wait-timeout", "180", *scale)
        say(f"up and well in {time.monotonic() - begin:.0f} s")
        key = stack.compose("exec", "--no-TTY", "api", "pushforward", "keys", "create", "--name", "drills")
        KEY["Authorization"] = f"Bearer {key.strip()}"
        for line in started(stack):
            say(f"  {line}")
        for drill in DRILLS:
            if not arguments.drills or drill.__name__ in arguments.drills:
                say(f"ok  {drill.__name__}: {drill(stack)}")
    except Exception as error:
        say(f"FAILED  {type(error).__name__}: {error}")
        ok = False
        for line in logs(stack):
            say(f"  {line}")
    finally:
        if not arguments.keep:
            stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
            shutil.rmtree(private)
    say("every drill held" if ok else "not every drill held")
    return 0 if ok else 1


def logs(stack: Stack) -> list[str]:
    run = subprocess.run(
        ["docker", "compose", "--project-directory", str(ROOT), "logs", "--no-color", "--tail", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.splitlines()


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
