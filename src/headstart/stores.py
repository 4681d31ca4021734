"""Stores: where MLflow keeps runs, models and their files, on this machine or elsewhere.

Goes in: what the environment says of MLflow's stores. Comes out: where a new experiment's files go, the files
of a version on this machine, and words for what a store refused. Never decides what is kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from headstart import sources
from headstart.downloads import redacted, safe_name
from headstart.errors import HeadstartError
from headstart.layout import Layout, written_whole

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own server reads it too, and hands it to its clients: only who has no server needs it.
ARTIFACT_ROOT = "MLFLOW_DEFAULT_ARTIFACT_ROOT"
# What to do without a module that a store needs.
DRIVERS = {
    "boto3": "pip install -e '.[s3]' in the project's folder",
    "psycopg": "pip install -e '.[postgresql]' in the project's folder",
    "psycopg2": "begin the address with postgresql+psycopg://",
}


def address() -> str:
    """Where MLflow keeps runs and, if that is elsewhere, the registry; without credentials."""
    import mlflow

    both = dict.fromkeys([mlflow.get_tracking_uri(), mlflow.get_registry_uri()])
    return redacted(" and ".join(both))


def page(experiment: str, run: str, file: str) -> str | None:
    """Where a browser finds a file of a run, if an MLflow server shows it."""
    import mlflow

    uri = redacted(mlflow.get_tracking_uri()).rstrip("/")
    return f"{uri}/#/experiments/{experiment}/runs/{run}/artifacts/{file}" if uri.startswith("http") else None


def place(layout: Layout) -> str | None:
    """Where the files of a new experiment go; None leaves it to the MLflow server.

    Raises:
        HeadstartError: a database is shared, and nothing says where the files go that belong to it.
    """
    import mlflow

    uri, root = mlflow.get_tracking_uri(), os.environ.get(ARTIFACT_ROOT)
    if uri.startswith("http"):
        return None
    if root:
        return f"{root.rstrip('/')}/{layout.recipe}"
    if uri.startswith("sqlite:"):
        return (layout.root / "mlartifacts").as_uri()
    raise HeadstartError(
        "nothing says where the files of models go",
        where=redacted(uri),
        do=f"set {ARTIFACT_ROOT}, such as s3://bucket/mlflow, or MLFLOW_TRACKING_URI to an MLflow server",
    )


def opened(layout: Layout, experiment: str) -> MlflowClient:
    """A client on the configured store, which has this experiment; its database is made once, under a lock.

    Of several processes that open a fresh SQLite database at once, all but one fail.
    """
    import mlflow

    layout.work.mkdir(parents=True, exist_ok=True)
    with FileLock(layout.root / ".headstart" / "mlflow.lock"):
        client = mlflow.MlflowClient()
        if client.get_experiment_by_name(experiment) is None:
            client.create_experiment(experiment, artifact_location=place(layout))
    return client


def files(name: str, version: str, uri: str) -> Path:
    """The files of a model's version, which lie at ``uri``: where they are, or copied once to the cache."""
    import mlflow
    from mlflow.utils.uri import is_local_uri

    if is_local_uri(uri, is_tracking_or_registry_uri=False):
        return Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}"))
    # MLflow gives each model an address of its own, and nobody writes to it again.
    key = hashlib.sha256(f"{address()}\0{uri}".encode()).hexdigest()[:16]
    folder = sources.cache() / "models" / f"{safe_name(name)}-{version}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):
        if not folder.exists():
            with written_whole(folder) as partial:
                mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(partial))
                if not (partial / "MLmodel").exists():  # S3 knows no folders: what is gone is an empty one
                    raise FileNotFoundError(f"no files at {uri}")
    return folder


@contextmanager
def asked(what: str) -> Iterator[None]:
    """Put into words what a store of MLflow's refuses in this block, whatever kind of store it is.

    Raises:
        HeadstartError: ``what``, with the store's own words.
    """
    try:
        yield
    except ImportError as error:
        if error.name not in DRIVERS:
            raise
        raise HeadstartError(what, where=f"{error.name} is not installed", do=DRIVERS[error.name]) from error
    except _refusals() as error:  # asked for only when something was raised
        raise HeadstartError(
            what,
            where=address(),
            table=redacted(str(error)).splitlines()[:10],
            do="check that it is up, its address and the keys to it; then run the same command again",
            transient=True,
        ) from error


def _refusals() -> tuple[type[Exception], ...]:
    """What MLflow's clients raise, whichever store they were talking to."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    found: tuple[type[Exception], ...] = (MlflowException, SQLAlchemyError, OSError)  # requests' are OSErrors
    with suppress(ImportError):
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        found += (Boto3Error, BotoCoreError, ClientError)
    return found
