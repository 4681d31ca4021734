"""Production stores: Prefect and MLflow on PostgreSQL, data and models on S3, each of them the real thing.

The servers are those of deploy/compose.yaml, with its commands and variables, as processes of this machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests import examples
from tests.conftest import ROOT, Project, clone, isolated
from tests.postgres import postgres
from tests.processes import answers, running
from tests.s3 import BUCKET, KEYS, s3
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.long]

PATIENCE = 180
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/how-to/production.md").read_text(encoding="utf-8")
HOSTS = "|".join(COMPOSE["services"])
VALUES = KEYS | {"POSTGRES_PASSWORD": "a-password", "HEADSTART_USER": "1000:1000"}


@dataclass
class Running:
    """What a machine needs to know of the servers that run."""

    plain: dict[str, str]  # the environment of any process
    ports: dict[str, int]  # by the port that compose gives
    worker: dict[str, str]  # the environment of compose's worker
    database: str  # URI of PostgreSQL, up to the name of the database
    mlflow: str


def command(service: str) -> list[str]:
    return [str(word) for word in COMPOSE["services"][service]["command"]]


def health(service: str, ports: dict[str, int]) -> str:
    """The address that compose's health check asks."""
    found = re.search(
        r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", COMPOSE["services"][service]["healthcheck"]["test"][-1]
    )
    assert found
    return f"http://127.0.0.1:{ports[found[1]]}{found[2]}"


def documented(service: str) -> list[str]:
    """The commands that docs/how-to/production.md runs in a service's container."""
    pattern = rf"^docker compose -f deploy/compose.yaml (?:exec|run)(?: -T| --rm)? {service} (.+)$"
    return re.findall(pattern, PAGE, re.MULTILINE)


def variables(service: str, ports: dict[str, int]) -> dict[str, str]:
    """What compose sets for a service, with loopback for the network between containers."""
    found = {}
    for name, value in COMPOSE["services"][service]["environment"].items():
        said = re.sub(r"\$\{(\w+):[?-][^}]*\}", lambda match: VALUES[match[1]], str(value))
        said = re.sub(rf"(//|@)({HOSTS})(?=:\d)", r"\g<1>127.0.0.1", said)
        said = re.sub("|".join(ports), lambda match: str(ports[match[0]]), said)
        found[name] = "127.0.0.1" if said == "0.0.0.0" else said
    return found


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("servers")
    plain = isolated(folder)
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        objects = stack.enter_context(s3(folder, plain, command("s3")))
        begin(database, "CREATE ROLE headstart SUPERUSER LOGIN; CREATE DATABASE straight")
        begin(database, COMPOSE["configs"]["databases"]["content"])
        ports = {name: free_port() for name in ("4200", "5000", "8080")}
        for name, uri in (("5432", database), ("8333", objects["AWS_ENDPOINT_URL_S3"])):
            ports[name] = urlsplit(uri).port or 0
        for name in ("mlflow", "prefect"):
            told = plain | variables(name, ports)
            stack.enter_context(running(*command(name), environment=told, log=folder / f"{name}.log"))
        answers(health("mlflow", ports), PATIENCE)
        answers(health("prefect", ports), PATIENCE)
        yield Running(
            plain,
            ports,
            plain | variables("worker", ports),
            database.removesuffix("/postgres"),
            f"http://127.0.0.1:{ports['5000']}",
        )


def begin(database: str, statements: str) -> None:
    ask(database, *filter(str.strip, statements.split(";")))


def ask(database: str, *statements: str) -> list[tuple[Any, ...]]:
    """The rows that the last of some SQL statements gives."""
    import psycopg

    with psycopg.connect(database.replace("+psycopg", ""), autocommit=True) as connection:
        for statement in statements:
            done = connection.execute(statement.encode())
        return done.fetchall() if done.description else []


@pytest.fixture(scope="module")
def first(servers: Running, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after its first run on one machine, pushed to the remote and committed."""
    folder = tmp_path_factory.mktemp("first")
    project = clone(folder / "project", servers.worker)
    examples.write_texts(folder / "shared/moods.csv")
    examples.write_bert(folder / "shared/bert")
    examples.write_recipe(
        project.root / "recipes/moods.yaml",
        ingest={"source": f"file:{folder}/shared/moods.csv"},
        validate={"adapter": "table", "columns": {"text": "body", "label": "mood", "domain": "shop"}},
        fetch={"backbone": "transformers:bert", "source": f"file:{folder}/shared/bert"},
    )
    project.ok(*documented("worker")[0].split())
    printed = project.ok("headstart", "run", "recipes/moods.yaml")
    assert "registered as moods version 1" in printed
    project.ok("dvc", "push")
    project.ok("git", "add", "--all")
    project.ok("git", "commit", "--quiet", "--message", "what the run has made")
    return project


def test_after_a_run_nothing_that_lasts_is_on_the_machine_alone(first: Project, servers: Running) -> None:
    assert not [name for name in ("mlflow.db", "mlartifacts", "mlruns") if (first.root / name).exists()]
    kept = keys(first.environment)
    assert any(re.fullmatch(r"dvc/files/md5/../\w+", key) for key in kept)
    assert any(re.fullmatch(r"mlflow/.*/MLmodel", key) for key in kept)
    assert any(re.fullmatch(r"mlflow/.*/report/report.html", key) for key in kept)
    runs = ask(f"{servers.database}/prefect", "SELECT state_type FROM flow_run WHERE name = 'retrain moods'")
    assert set(runs) == {("COMPLETED",)}
    # Whoever opens the report from Prefect's page may sit at any machine.
    links = ask(
        f"{servers.database}/prefect", "SELECT data #>> '{}' FROM artifact WHERE key = 'report-moods'"
    )
    assert links and all(f"({servers.mlflow}/#/experiments/" in link for (link,) in links)
    assert ask(f"{servers.database}/mlflow", "SELECT name, version FROM model_versions") == [("moods", 1)]


def keys(environment: dict[str, str]) -> list[str]:
    import boto3

    session = boto3.Session(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
    client = session.client("s3", "us-east-1", endpoint_url=environment["AWS_ENDPOINT_URL_S3"])
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return [found["Key"] for page in pages for found in page["Contents"]]


def test_a_clone_elsewhere_has_nothing_to_run_and_predicts_with_the_same_champion(
    first: Project, servers: Running, tmp_path: Path
) -> None:
    first.ok("git", "clone", "--quiet", str(first.root), str(tmp_path / "second"))
    # Another machine: a cache of its own, and no way to the database.
    told = first.environment | {"HEADSTART_CACHE": str(tmp_path / "cache")}
    del told["MLFLOW_REGISTRY_URI"]
    second = Project(tmp_path / "second", told)
    second.ok("dvc", "pull")
    last = second.ok("headstart", "run", "recipes/moods.yaml").strip().splitlines()[-1]
    assert last.startswith("moods: report ran; ")  # and no stage did
    assert f"already registered as moods version 1 (candidate) in {servers.mlflow}" in last
    assert second.ok("git", "status", "--porcelain") == ""

    (tmp_path / "rows.csv").write_text("text\nthe lamp was splendid\nthe soup was dreadful\n")
    said = second.ok("headstart", "predict", "moods", str(tmp_path / "rows.csv"))
    assert re.findall(r"\b(?:un)?happy\b", said.partition("\n")[2]) == ["happy", "unhappy"], said
    assert [found.parent.name[:8] for found in (tmp_path / "cache/models").glob("*/MLmodel")] == ["moods-1-"]


def test_the_mlflow_server_answers_those_who_call_it_by_its_name_alone(servers: Running) -> None:
    def status(host: str) -> int:
        address = f"{servers.mlflow}/api/2.0/mlflow/registered-models/search"
        request = urllib.request.Request(address, headers={"Host": host})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    port = servers.mlflow.rpartition(":")[2]
    assert status(f"mlflow:{port}") == 200
    assert status(f"elsewhere.example.com:{port}") == 403


def test_an_address_for_a_driver_that_is_not_here_is_mended_in_words(tmp_path: Path) -> None:
    told = isolated(tmp_path) | {"MLFLOW_TRACKING_URI": "postgresql://someone@127.0.0.1/mlflow"}
    done = Project(ROOT, told)("headstart", "models")
    assert done.returncode == 1
    assert "psycopg2 is not installed" in done.stderr
    assert "begin the address with postgresql+psycopg://" in done.stderr


# A machine that has a database and S3, and no MLflow server. Prints what each step said.
STRAIGHT = """
import os, sys
from pathlib import Path
from headstart import environment, models, registry
from headstart.errors import HeadstartError
from headstart.layout import Layout
from headstart.recipe import load

root = Path.cwd()
environment.prepare(root)
recipe, layout = load(root / "recipes/moods.yaml"), Layout(root, "moods")

def say(step):
    try:
        print(step())
    except HeadstartError as error:
        print(str(error).replace(chr(10), " "))

say(lambda: registry.register(recipe, layout))
os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"], closed = sys.argv[1:]
os.environ["MLFLOW_S3_ENDPOINT_URL"] = closed
say(lambda: registry.register(recipe, layout))
del os.environ["MLFLOW_S3_ENDPOINT_URL"]
say(lambda: registry.register(recipe, layout))
os.environ["MLFLOW_S3_ENDPOINT_URL"] = closed
say(lambda: models.load("moods", "candidate"))
del os.environ["MLFLOW_S3_ENDPOINT_URL"]
say(lambda: models.load("moods", "candidate").model(["the lamp was splendid"]).labels)
say(lambda: models.load("moods", "7"))
"""


def test_without_an_mlflow_server_the_default_artifact_root_says_where_and_refusals_are_in_words(
    first: Project, servers: Running
) -> None:
    uri = f"{servers.database}/straight".replace("//postgres@", "//postgres:a-password@")
    closed = f"http://127.0.0.1:{free_port()}"
    told = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri, "AWS_MAX_ATTEMPTS": "1"}
    done = first(sys.executable, "-c", STRAIGHT, f"s3://{BUCKET}/straight/", closed, extra=told)
    assert done.returncode == 0, done.stderr
    nowhere, refused, registered, lost, named, missing = done.stdout.splitlines()
    assert nowhere.startswith("nothing says where the files of models go")
    assert refused.startswith("the MLflow store refused") and closed in refused
    assert registered.startswith("registered as moods version 1 (candidate) in postgresql+psycopg://***@127")
    assert lost.startswith("moods candidate cannot be had") and closed in lost
    assert named == "['happy']"
    assert missing.startswith("the registry has no moods version 7")
    assert "a-password" not in done.stdout
    assert any(re.fullmatch(r"straight/moods/.*/MLmodel", key) for key in keys(first.environment))


def test_a_backup_of_postgresql_can_be_restored_and_upgrading_what_is_current_changes_nothing(
    first: Project, servers: Running, tmp_path: Path
) -> None:
    begin(f"{servers.database}/postgres", "CREATE DATABASE restored_mlflow; CREATE DATABASE restored_prefect")
    ask_of_postgres = {"PGHOST": "127.0.0.1", "PGPORT": str(servers.ports["5432"])}
    for service, done in (("prefect", 1), ("mlflow", 1), ("postgres", 4)):
        assert len(documented(service)) == done
        for line in documented(service):
            told = servers.plain | ask_of_postgres
            if service != "postgres":
                told |= variables(service, servers.ports)
            aside = line.replace("--dbname=", "--dbname=restored_")  # the servers go on meanwhile
            ended = subprocess.run(
                ["bash", "-c", aside], cwd=tmp_path, env=told, capture_output=True, text=True
            )
            assert ended.returncode == 0, (line, ended.stdout, ended.stderr)
    questions = {
        "mlflow": "SELECT alias, version FROM registered_model_aliases ORDER BY alias",
        "prefect": "SELECT id, state_type FROM flow_run ORDER BY id",
    }
    for name, question in questions.items():
        rows = ask(f"{servers.database}/restored_{name}", question)
        assert rows and rows == ask(f"{servers.database}/{name}", question)


def test_the_worker_makes_its_pool_and_the_deployments_wait_there(first: Project, servers: Running) -> None:
    port = {"PREFECT_WORKER_WEBSERVER_PORT": str(servers.ports["8080"])}
    log = first.root.parent / "worker.log"
    told = first.environment | port
    with running(*command("worker"), environment=told, log=log, folder=first.root):
        answers(health("worker", servers.ports), PATIENCE)
        first.ok(*documented("worker")[1].split())
    pools = {found["work_pool_name"] for found in posted(servers, "deployments/filter")}
    assert pools == {"headstart"}


def posted(servers: Running, path: str) -> Any:
    address = f"{servers.worker['PREFECT_API_URL']}/{path}"
    request = urllib.request.Request(address, b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


RESOLVED = """
import asyncio, json
from pathlib import Path
from prefect.workers.base import BaseJobConfiguration

template = json.loads(Path("deploy/docker.json").read_text())
found = asyncio.run(BaseJobConfiguration.from_template_and_values(template, {"env": {"MORE": "1"}}))
print(json.dumps(found.env))
"""


def test_work_pools_are_made_from_the_job_templates_and_secrets_reach_the_runs(
    first: Project, servers: Running
) -> None:
    commands = re.findall(r"^prefect work-pool create .+$", PAGE, re.MULTILINE)
    for line in commands:
        first.ok(*line.split())
    types = {pool["name"]: pool["type"] for pool in posted(servers, "work_pools/filter")}
    assert types.items() >= {("headstart-docker", "docker"), ("headstart-kubernetes", "kubernetes")}

    (saving,) = re.findall(r"^```python\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    told = json.loads(first.ok(sys.executable, "-c", saving + RESOLVED).splitlines()[-1])
    secret = ("MLFLOW_REGISTRY_URI", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert {name: told[name] for name in secret} == {name: servers.worker[name] for name in secret}
    assert told["MORE"] == "1"
    # Beside the address of Prefect, which a worker hands on, a run has what compose's worker has.
    worker = COMPOSE["services"]["worker"]["environment"]
    assert told.keys() - {"MORE"} == worker.keys() - {"PREFECT_API_URL"}
    plain = {name for name in worker.keys() & told.keys() if "$" not in worker[name]}
    assert {name: told[name] for name in plain} == {name: worker[name] for name in plain}
