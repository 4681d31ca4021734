"""Promotion: which version of a model is champion, and how it came to be.

Goes in: decisions, made by the gate or by a person. Comes out: aliases in the registry, and a history as tags
on its versions. Never judges a model, and never touches its files.

Four aliases lead to versions. ``candidate``: what was registered last, anew or again. ``challenger``: the
latest that was fit for use but not shown to be better. ``champion``: the one to use. ``previous``: where
``rollback`` leads.

A change writes several tags and aliases, and the registry writes each on its own. So that a process which
is killed leaves nothing half done, the whole change is first written down as one tag of the model, the
``PENDING`` one; whoever comes next carries it through before doing anything else (a write-ahead log: Gray &
Reuter 1992, chapter 9). One process at a time: see ``locked``.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headstart import mojibake
from headstart.errors import HeadstartError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.entities import PagedList

CANDIDATE, CHALLENGER, CHAMPION, PREVIOUS = ALIASES = ("candidate", "challenger", "champion", "previous")
PENDING = "headstart.pending"
COUNT = "headstart.decisions"
DIGEST = "headstart.digest"
ENTRY = "headstart.decision."  # and the number of the decision, from 1 for each model
VERDICT = "headstart.verdict"
PATIENCE = 300  # seconds to wait for whoever else decides about the same model
RUNS = 200  # asked for at a time
LONGEST = 3000  # characters of all reasons: PostgreSQL holds 5,000 in a model's tag

Action = Literal["promoted", "refused", "forced", "rolled back"]


@dataclass(frozen=True)
class Entry:
    """One decision about a version."""

    number: int
    at: str  # ISO 8601, UTC
    by: str
    action: Action
    version: str
    champion: str | None  # the one before the decision
    reasons: list[str]
    judged: str | None = None  # what the gate looked at, as a digest

    def __str__(self) -> str:
        against = f" (champion was {self.champion})" if self.champion else ""
        return f"{self.at[:16].replace('T', ' ')} {self.action}{against}: {'; '.join(self.reasons)}"


def champion_of(client: MlflowClient, name: str) -> str | None:
    """The champion's version, or None."""
    return aliases(client, name).get(CHAMPION)


def rival_of(now: dict[str, str]) -> str | None:
    """What a new version has to beat by these aliases: the champion, or if that is gone the one before it."""
    return now.get(CHAMPION) or now.get(PREVIOUS)


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Version by alias; of a model that does not exist, none."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def _all(ask: Callable[..., PagedList[Any]], *about: Any, **options: Any) -> list[Any]:
    """What a search of MLflow's finds, on all its pages."""
    page = ask(*about, **options)
    found = list(page)
    while page.token:
        page = ask(*about, **options, page_token=page.token)
        found += page
    return found


def models(client: MlflowClient) -> list[str]:
    """The names of all models."""
    return sorted(model.name for model in _all(client.search_registered_models))


def versions(client: MlflowClient, name: str, digest: str | None = None) -> list[ModelVersion]:
    """All versions, newest first; or those that carry a digest. Of thousands, all take seconds."""
    wanted = _named(name) + (f" and tags.`{DIGEST}` = '{digest}'" if digest else "")
    return sorted(_all(client.search_model_versions, wanted), key=lambda version: -int(version.version))


def _named(name: str) -> str:
    quoted = name.replace("'", "\\'")
    return f"name = '{quoted}'"


def _version(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    """One version, or None if there is none of this number."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:  # or it is no number
            return None
        raise
    return found if str(found.version) == number else None


def entries(tags: dict[str, str]) -> list[Entry]:
    """The decisions about one version, oldest first, from its tags."""
    found = [Entry(**json.loads(value)) for key, value in tags.items() if key.startswith(ENTRY)]
    return sorted(found, key=lambda entry: entry.number)


def history(client: MlflowClient, name: str) -> list[Entry]:
    """All decisions about a model, oldest first."""
    found = [entry for version in versions(client, name) for entry in entries(version.tags)]
    return sorted(found, key=lambda entry: entry.number)


def had_champion(client: MlflowClient, name: str) -> bool:
    """Whether the history knows of a champion, which may be gone."""
    return any(entry.champion or entry.action in {"promoted", "forced"} for entry in history(client, name))


def crown(
    client: MlflowClient,
    name: str,
    version: str,
    reasons: list[str],
    *,
    forced: bool = False,
    judged: str | None = None,
    against: str | None = None,
) -> Entry | None:
    """Make a version the champion; what was champion becomes ``previous``, or stays it if that is gone.

    Args:
        client: of the registry.
        name: the model.
        version: the one to promote; if it is champion already, nothing happens.
        reasons: why, in sentences.
        forced: a person decided, not the gate.
        judged: digest of what the gate looked at.
        against: the rival that the gate compared with. If it is another one by now, nothing happens: the
            proof is about a model that is gone. Nor does anything if the gate, which may have judged before
            that, would crown a version that was rolled back from.

    Returns:
        The decision; None if the rival is another one than ``against``, or this version is champion without a
        decision, or if it was rolled back from.
    """
    with _turn(client, name) as now:
        before = rival_of(now.aliases)
        decided = entries(client.get_model_version(name, version).tags)
        reigns = now.aliases.get(CHAMPION) == version
        said = bool(decided) and decided[-1].reasons == reasons
        if reigns and (said or not forced):
            return decided[-1] if decided else None
        if not forced and (before != against or rolled_back(decided)):
            return None
        if before == version and not reigns:
            before = None
        action: Action = "forced" if forced else "promoted"
        entry = now.entry(action, reasons, version=version, champion=before, judged=judged)
        change: dict[str, str | None] = {} if reigns else {CHAMPION: version, PREVIOUS: before}
        if now.aliases.get(CHALLENGER) == version:
            change[CHALLENGER] = None
        _change(client, name, entry, change)
        return entry


def refuse(
    client: MlflowClient,
    name: str,
    version: str,
    reasons: list[str],
    *,
    judged: str,
    against: str | None,
    fit: bool,
) -> Entry | None:
    """Write down that a version was not promoted; ``fit``: it becomes the challenger.

    What was ``judged`` and refused already is not written down again. As for ``crown``, nothing happens, and
    None is returned, if the rival is another one than ``against``, or the version was rolled back from.
    """
    with _turn(client, name) as now:
        decided = entries(client.get_model_version(name, version).tags)
        champion = rival_of(now.aliases)
        if champion != against or rolled_back(decided):
            return None
        if decided and (decided[-1].action, decided[-1].judged) == ("refused", judged):
            return decided[-1]
        entry = now.entry("refused", reasons, version=version, champion=champion, judged=judged)
        _change(client, name, entry, {CHALLENGER: version} if fit else {})
        return entry


def rollback(client: MlflowClient, name: str, because: str) -> Entry:
    """Make ``previous`` the champion again; the gate will not promote the present one a second time.

    ``previous`` then leads to what was champion before that one, by the last crowning of it that stands.

    Raises:
        HeadstartError: there is no champion, or none before it.
    """
    with _turn(client, name) as now:
        if now.unfinished and now.unfinished.action == "rolled back":
            return now.unfinished  # the same command, killed on its way
        if CHAMPION not in now.aliases or PREVIOUS not in now.aliases:
            lacking = "earlier champion" if CHAMPION in now.aliases else CHAMPION
            raise HeadstartError(
                f"{name} has no {lacking} to go back to",
                do=f"`headstart models {name}` lists its versions; `headstart promote` takes any of them",
            )
        undone, restored = now.aliases[CHAMPION], now.aliases[PREVIOUS]
        standing = _standing(entries(client.get_model_version(name, restored).tags))
        before = standing[-1].champion if standing else None
        if before and not _version(client, name, before):
            before = None  # somebody has deleted it since
        reasons = [because, f"version {restored} is champion again"]
        entry = now.entry("rolled back", reasons, version=undone, champion=undone)
        _change(client, name, entry, {CHAMPION: restored, PREVIOUS: before})
        return entry


def rolled_back(decided: list[Entry]) -> bool:
    """Whether the latest of these decisions about a version is a rollback from it."""
    return bool(decided) and decided[-1].action == "rolled back"


def _standing(decided: list[Entry]) -> list[Entry]:
    """The crownings of a version that no rollback has undone: each undoes the last that stands."""
    found: list[Entry] = []
    for entry in decided:
        if entry.action in {"promoted", "forced"}:
            if entry.champion != entry.version:  # or a person has spoken for the champion there was
                found.append(entry)
        elif entry.action == "rolled back":
            del found[-1:]
    return found


def carry_through(client: MlflowClient, name: str) -> None:
    """Finish the change that a killed process has begun, if there is one."""
    with _turn(client, name):
        pass


@dataclass(frozen=True)
class _Present:
    """How things stand while nobody else may change them."""

    aliases: dict[str, str]
    decisions: int
    unfinished: Entry | None  # what a killed process had begun, and is done now

    def entry(self, action: Action, reasons: list[str], **about: Any) -> Entry:
        """The next decision; ``about``: the version, the champion before it, and what was judged."""
        by = f"{_user()}@{socket.gethostname()}"
        at = datetime.now(UTC).isoformat(timespec="seconds")
        return Entry(
            number=self.decisions + 1, at=at, by=by, action=action, reasons=_clipped(reasons), **about
        )


def _user() -> str:
    """Who this is: a name, or the number of a container's user who has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # before Python 3.13, and since
        return str(os.getuid())


@contextmanager
def _turn(client: MlflowClient, name: str) -> Iterator[_Present]:
    """Hold the lock, with nothing left half done."""
    with locked(name):
        model, unfinished = client.get_registered_model(name), None
        if pending := model.tags.get(PENDING):
            begun = json.loads(pending)
            unfinished = Entry(**begun["entry"])
            _apply(client, name, unfinished, begun["aliases"])
            model = client.get_registered_model(name)
        now = {alias: str(version) for alias, version in model.aliases.items()}
        yield _Present(now, int(model.tags.get(COUNT, 0)), unfinished)


def _change(client: MlflowClient, name: str, entry: Entry, change: dict[str, str | None]) -> None:
    """Write a decision down, then carry it through. ``change``: version by alias, None to take it away."""
    client.set_registered_model_tag(name, PENDING, _json({"entry": asdict(entry), "aliases": change}))
    _apply(client, name, entry, change)


def _apply(client: MlflowClient, name: str, entry: Entry, change: dict[str, str | None]) -> None:
    """What a decision changes. Any part may have been done before, and doing it again changes nothing.

    Of versions that somebody has deleted meanwhile nothing is written: it would fail at every later turn too.
    """
    touched = {entry.version, *filter(None, change.values())}
    there = {number for number in touched if _version(client, name, number)}
    if entry.version in there:
        client.set_model_version_tag(name, entry.version, f"{ENTRY}{entry.number:06}", _json(asdict(entry)))
    if CHAMPION in change and change[CHAMPION] not in there:
        change = {}  # the champion there is stays, and so does the way back from it
    # The champion last but one: whoever sees the new one can find the old one.
    for alias in sorted(change, key=(PREVIOUS, CHAMPION, CHALLENGER).index):
        version = change[alias]
        if version in there:
            client.set_registered_model_alias(name, alias, str(version))
        else:
            client.delete_registered_model_alias(name, alias)
    client.set_registered_model_tag(name, COUNT, str(entry.number))
    client.delete_registered_model_tag(name, PENDING)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # an escaped letter is six, and a tag holds only so many


def _clipped(reasons: list[str]) -> list[str]:
    most = LONGEST // max(1, len(reasons))
    # What a terminal passes on need not be UTF-8.
    reasons = [mojibake.escaped(reason) for reason in reasons]
    return [reason if len(reason) <= most else f"{reason[: most - 1]}…" for reason in reasons]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the right to change a model's aliases.

    With a registry on PostgreSQL the database keeps the lock, so it holds across machines, and ends with the
    process that has it. Otherwise it is a file of this machine: beside an SQLite database, or in the cache
    folder for a registry behind a server.

    Raises:
        HeadstartError: someone else has had it for minutes.
    """
    import mlflow

    uri = mlflow.get_registry_uri()
    holding = _in_database(uri, name) if uri.startswith("postgresql") else _in_file(uri, name)
    with holding:
        yield


def _busy(name: str, where: str) -> HeadstartError:
    return HeadstartError(
        f"someone else is deciding about {name} and does not finish",
        where=where,
        do="look for a hanging `headstart` process; the same command can be run again",
        transient=True,
    )


@contextmanager
def _in_database(uri: str, name: str) -> Iterator[None]:
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.pool import NullPool

    from headstart import sources

    key = int.from_bytes(hashlib.sha256(f"headstart {name}".encode()).digest()[:8], signed=True)
    engine = create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"SET lock_timeout = '{PATIENCE}s'"))
        try:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
        except OperationalError as error:
            raise _busy(name, sources.redacted(uri)) from error
        yield  # closing the connection gives the lock back


@contextmanager
def _in_file(uri: str, name: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    from headstart import sources

    digest = hashlib.sha256(f"{uri}\0{name}".encode()).hexdigest()[:16]
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
        path = database.with_name(f"{database.name}.{digest}.lock")
    else:
        path = sources.cache() / "locks" / f"{digest}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=PATIENCE):
            yield
    except Timeout as error:
        raise _busy(name, str(path)) from error


def opened() -> MlflowClient:
    """A client of the configured registry.

    Raises:
        HeadstartError: it cannot be reached.
    """
    import mlflow

    from headstart import stores

    with stores.asked("the model registry cannot be reached"):
        client = mlflow.MlflowClient()
        client.search_registered_models(max_results=1)
    return client


def known(client: MlflowClient, name: str) -> list[ModelVersion]:
    """The versions of a model that must exist, newest first.

    Raises:
        HeadstartError: there is no such model; names the nearest.
    """
    newest(client, name)
    return versions(client, name)


def newest(client: MlflowClient, name: str) -> ModelVersion:
    """The newest version of a model that must exist.

    Raises:
        HeadstartError: there is no such model; names the nearest.
    """
    order = ["version_number DESC"]
    if found := client.search_model_versions(_named(name), max_results=1, order_by=order):
        return found[0]
    import difflib

    names = models(client)
    if name in names:
        raise HeadstartError(f"the model {name} has no version yet", do="register one: `headstart run`")
    near = difflib.get_close_matches(name, names, n=1)
    raise HeadstartError(
        f"the registry has no model {name}",
        do=f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none yet'}",
    )


def tags(client: MlflowClient, name: str, version: str) -> dict[str, str]:
    """What is written down about a version of a model.

    Raises:
        HeadstartError: there is no such version.
    """
    found = _version(client, name, version)
    if found is None:
        numbers = ", ".join(str(each.version) for each in reversed(known(client, name)))
        raise HeadstartError(f"{name} has no version {version}", do=f"it has {numbers}")
    return dict(found.tags)


def _place(alias: str) -> tuple[int, str]:
    """Those that people made come after ours."""
    return (ALIASES.index(alias), "") if alias in ALIASES else (len(ALIASES), alias)


def _metrics(client: MlflowClient, runs: list[str]) -> dict[str, dict[str, float]]:
    """Metrics by run. A request for each would take minutes for thousands."""
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    found: dict[str, dict[str, float]] = {}
    while left := [run for run in runs if run not in found]:
        found[left[0]] = {}
        try:
            first = client.get_run(left[0])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # as after `mlflow gc`
                raise
            continue
        # As a rule all versions of a model were made in one experiment.
        for start in range(0, len(left), RUNS):
            some = ", ".join(f"'{run}'" for run in left[start : start + RUNS])
            for run in client.search_runs(
                [first.info.experiment_id], f"attributes.run_id IN ({some})", run_view_type=ViewType.ALL
            ):
                found[run.info.run_id] = run.data.metrics
    return found


def table(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """One line per version, newest first: aliases, test metrics, data and the latest decision."""
    by_version: dict[str, list[str]] = {}
    for alias, version in aliases(client, name).items():
        by_version.setdefault(version, []).append(alias)
    lines, found = [], known(client, name)
    metrics = _metrics(client, [version.run_id for version in found if version.run_id])
    for version in found:
        number = str(version.version)
        measured = metrics.get(version.run_id, {})
        decided = entries(version.tags)
        lines.append(
            {
                "version": number,
                "aliases": ", ".join(sorted(by_version.get(number, ()), key=_place)),
                "accuracy": measured.get("test.accuracy.value"),
                "balanced accuracy": measured.get("test.balanced_accuracy.value"),
                "data": version.tags.get("headstart.data", "")[:8],
                "decision": str(decided[-1]) if decided else "",
            }
        )
    return lines
