"""Production stores: Prefect and MLflow on PostgreSQL, data and artifacts on S3, each of them the real thing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import examples
from tests.conftest import Project, clone, isolated
from tests.postgres import postgres
from tests.processes import answers, running
from tests.s3 import BUCKET, s3
from tests.servers import free_port

pytestmark = pytest.mark.slow

PATIENCE = 180


@dataclass
class Stores:
    """Servers that run, and where they keep what they are given."""

    client: dict[str, str]  # the environment of a machine that works with them
    database: str  # URI of PostgreSQL, up to the name of the database
    objects: dict[str, str]  # the variables of S3


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    folder = tmp_path_factory.mktemp("stores")
    plain = isolated(folder)
    with ExitStack() as open_until_the_end:
        begin = open_until_the_end.enter_context
        database = begin(postgres()).removesuffix("/postgres")
        objects = begin(s3(folder, plain))
        create(database, "prefect", "mlflow", "straight")
        prefect, mlflow = free_port(), free_port()
        begin(
            running(
                *("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect)),
                environment=plain
                | {
                    "DO_NOT_TRACK": "true",
                    "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"{database}/prefect".replace(
                        "+psycopg", "+asyncpg"
                    ),
                },
                log=folder / "prefect.log",
            )
        )
        begin(
            running(
                *("mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow), "--workers", "1"),
                environment=plain
                | objects
                | {
                    "MLFLOW_BACKEND_STORE_URI": f"{database}/mlflow",
                    "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                },
                log=folder / "mlflow.log",
            )
        )
        import time

        t = time.time()
        answers(f"http://127.0.0.1:{mlflow}/health", PATIENCE)
        print("mlflow up", time.time() - t)
        answers(f"http://127.0.0.1:{prefect}/api/health", PATIENCE)
        print("prefect up", time.time() - t)
        client = plain | {
            "PREFECT_API_URL": f"http://127.0.0.1:{prefect}/api",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow}",
        }
        yield Stores(client, database, objects)


def create(database: str, *names: str) -> None:
    import psycopg

    with psycopg.connect(plain_uri(f"{database}/postgres"), autocommit=True) as connection:
        for name in names:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())


def plain_uri(uri: str) -> str:
    return uri.replace("+psycopg", "")


@pytest.fixture(scope="module")
def pulled(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on another machine: cloned with git and pulled with DVC, after the first one has run."""
    folder = tmp_path_factory.mktemp("machines")
    first = clone(folder / "first", stores.client | stores.objects)
    examples.write_text_project(folder)
    recipe = (folder / "recipes/moods.yaml") if (folder / "recipes").exists() else None
    assert recipe
    return first


def test_it(stores: Stores, tmp_path: Path) -> None:
    import time

    t = time.time()

    def say(x):
        print(x, round(time.time() - t, 1), flush=True)

    shared = tmp_path / "shared"
    first = clone(tmp_path / "first", stores.client | stores.objects)
    examples.write_texts(shared / "moods.csv")
    examples.write_bert(shared / "bert")
    examples.write_recipe(
        first.root / "recipes/moods.yaml",
        ingest={"source": f"file:{shared}/moods.csv"},
        validate={"adapter": "table", "columns": {"text": "body", "label": "mood", "domain": "shop"}},
        fetch={"backbone": "transformers:bert", "source": f"file:{shared}/bert"},
    )
    say("clone")
    print(first.ok("headstart", "run", "recipes/moods.yaml"))
    say("run")
    first.ok("dvc", "remote", "add", "-d", "store", f"s3://{BUCKET}/dvc")
    print(first.ok("dvc", "push"))
    say("push")
    first.ok("git", "add", "--all")
    first.ok("git", "commit", "--quiet", "--message", "trained")
    print(first.ok("git", "status", "--short", "--ignored"))
    first.ok("git", "clone", "--quiet", str(first.root), str(tmp_path / "second"))
    second = Project(tmp_path / "second", first.environment | {"HEADSTART_CACHE": str(tmp_path / "cache2")})
    print(second.ok("dvc", "pull"))
    say("pull")
    done = second("headstart", "run", "recipes/moods.yaml")
    print(done.stdout, done.stderr)
    say("run2")
    (second.root / "some.txt").write_text("the lamp was splendid\n")
    print(second("headstart", "predict", "--help").stdout)
    done = second("headstart", "predict", "moods", "some.txt", "-o", "out.csv")
    print(done.stdout, done.stderr)
    say("predict")
    os.system(f"ls -a {second.root}")
