from __future__ import annotations

import getpass
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from headstart import models, promotion, trials
from headstart.errors import HeadstartError
from headstart.gate import Check, Verdict
from headstart.layout import Layout
from tests import cached
from tests.postgres import postgres

NAME = "moods"
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry's database with four versions of a model; making one takes seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    # In a process of its own: a database that is open cannot be handed to a child.
    in_child(lambda: fill(f"sqlite:///{path}", 4))
    return path


@pytest.fixture
def registry(blank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import mlflow

    shutil.copy(blank, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)


def fill(uri: str, versions: int) -> None:
    import mlflow

    mlflow.set_tracking_uri(uri)
    client = MlflowClient()
    client.create_registered_model(NAME)
    for _ in range(versions):
        client.create_model_version(NAME, source="file:///nowhere")


def in_child(work: Callable[[], None]) -> int:
    """Run something in a process of its own, and return how it ended."""
    import mlflow.store.model_registry.sqlalchemy_store  # here, or each child would take seconds for it
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    child = FORK.Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def state(client: MlflowClient) -> dict[str, Any]:
    """All that a decision may change, but for the moment it was made."""
    model = client.get_registered_model(NAME)
    tags = {
        (str(version.version), key): value
        if not key.startswith(promotion.ENTRY)
        else json.loads(value) | {"at": ""}
        for version in promotion.versions(client, NAME)
        for key, value in version.tags.items()
    }
    return {"aliases": promotion.aliases(client, NAME), "model": dict(model.tags), "versions": tags}


def crown(client: MlflowClient, version: str, against: str | None = None) -> None:
    assert promotion.crown(client, NAME, version, ["better"], against=against, judged=f"judged {version}")


def test_the_champion_before_becomes_previous_and_the_history_keeps_why(registry: str) -> None:
    client = promotion.opened()
    crown(client, "1")
    promotion.crown(client, NAME, "2", ["the boss says so"], forced=True)
    assert promotion.aliases(client, NAME) == {"champion": "2", "previous": "1"}
    first, second = promotion.history(client, NAME)
    assert (first.number, first.action, first.version, first.champion) == (1, "promoted", "1", None)
    assert (second.number, second.action, second.version, second.champion) == (2, "forced", "2", "1")
    assert second.reasons == ["the boss says so"]
    assert "@" in second.by


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 12345"), OSError("No username set")])
def test_whoever_has_no_name_is_known_by_a_number(
    error: Exception, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", nameless)
    client = promotion.opened()
    crown(client, "1")
    assert promotion.history(client, NAME)[0].by.startswith(f"{os.getuid()}@")


def test_promoting_the_champion_again_changes_nothing(registry: str) -> None:
    client = promotion.opened()
    crown(client, "1")
    before = state(client)
    crown(client, "1")
    assert state(client) == before


def test_what_a_person_says_of_the_champion_is_kept_and_said_once(registry: str) -> None:
    client = promotion.opened()
    crown(client, "1")
    crown(client, "2", against="1")
    promotion.rollback(client, NAME, "it calls everything happy")
    client.set_registered_model_alias(NAME, "champion", "2")
    client.set_registered_model_alias(NAME, "previous", "1")
    for _ in range(2):
        entry = promotion.crown(client, NAME, "2", ["the audit wants it"], forced=True)
        assert entry
        assert (entry.action, entry.champion) == ("forced", "2")
    assert promotion.aliases(client, NAME) == {"champion": "2", "previous": "1"}
    assert [entry.action for entry in promotion.history(client, NAME)][2:] == ["rolled back", "forced"]
    assert promotion.rollback(client, NAME, "after all").version == "2"
    assert promotion.aliases(client, NAME) == {"champion": "1"}


def test_every_model_and_every_alias_is_listed(registry: str) -> None:
    client = promotion.opened()
    for i in range(105):
        client.create_registered_model(f"a{i:03}")
    assert len(promotion.models(client)) == 106
    client.set_registered_model_alias(NAME, "champion", "2")
    client.set_registered_model_alias(NAME, "audited", "2")
    aliases = {line["version"]: line["aliases"] for line in promotion.table(client, NAME)}
    assert aliases["2"] == "champion, audited"
    with pytest.raises(HeadstartError, match="the model a001 has no version yet"):
        promotion.known(client, "a001")


def test_a_list_has_the_metrics_of_every_version_and_asks_for_many_at_a_time(
    registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = promotion.opened()
    for place, experiment in enumerate(("moods", "moods2", "moods")):
        found = client.get_experiment_by_name(experiment)
        run = client.create_run(found.experiment_id if found else client.create_experiment(experiment))
        client.log_metric(run.info.run_id, "test.accuracy.value", place / 10)
        client.create_model_version(NAME, source="file:///nowhere", run_id=run.info.run_id)
    client.delete_run(run.info.run_id)  # in MLflow: until `mlflow gc` its figures are known
    monkeypatch.setattr(promotion, "RUNS", 2)
    client.create_model_version(NAME, source="file:///nowhere", run_id="1" * 32)  # after `mlflow gc`
    asked: list[str] = []
    one = MlflowClient.get_run
    monkeypatch.setattr(MlflowClient, "get_run", lambda self, run: asked.append(run) or one(self, run))
    lines = promotion.table(client, NAME)
    assert [line["accuracy"] for line in lines] == [None, 0.2, 0.1, 0.0, None, None, None, None]
    assert len(asked) == 3  # for one of each experiment, and for the one that is nowhere


def test_whoever_asks_about_one_version_does_not_read_all_of_them(
    registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = promotion.opened()
    client.set_model_version_tag(NAME, "2", promotion.DIGEST, "abc")
    assert [str(each.version) for each in promotion.versions(client, NAME, "abc")] == ["2"]
    monkeypatch.setattr(promotion, "versions", lambda *_: pytest.fail("all versions were read"))
    assert str(promotion.newest(client, NAME).version) == "4"
    crown(client, "1")
    crown(client, "2", "1")
    promotion.rollback(client, NAME, "undone")
    assert promotion.tags(client, NAME, "2").keys() > {promotion.DIGEST}


@pytest.mark.parametrize("version", ["5", "02", "two"])
def test_a_version_that_is_not_there_is_answered_with_those_that_are(registry: str, version: str) -> None:
    with pytest.raises(HeadstartError, match=f"moods has no version {version}") as caught:
        promotion.tags(promotion.opened(), NAME, version)
    assert caught.value.do == "it has 1, 2, 3, 4"


def test_proof_against_a_champion_that_is_gone_promotes_nobody(registry: str) -> None:
    client = promotion.opened()
    crown(client, "1")
    assert promotion.crown(client, NAME, "3", ["better"], against="2") is None
    assert promotion.champion_of(client, NAME) == "1"
    assert len(promotion.history(client, NAME)) == 1


def test_proof_from_before_a_rollback_neither_promotes_nor_hides_what_was_rolled_back_from(
    registry: str,
) -> None:
    client = promotion.opened()
    crown(client, "1")
    crown(client, "2", against="1")
    promotion.rollback(client, NAME, "it calls everything happy")
    before = state(client)
    assert promotion.crown(client, NAME, "2", ["better"], against="1", judged="earlier") is None
    assert promotion.refuse(client, NAME, "2", ["no"], judged="earlier", against="1", fit=True) is None
    assert state(client) == before
    assert promotion.crown(client, NAME, "2", ["the audit wants it"], forced=True)
    assert promotion.champion_of(client, NAME) == "2"


def test_a_version_that_was_forced_while_the_gate_judged_it_is_not_refused_against_itself(
    registry: str,
) -> None:
    client = promotion.opened()
    crown(client, "1")
    promotion.crown(client, NAME, "2", ["the boss says so"], forced=True)
    before = state(client)
    assert promotion.refuse(client, NAME, "2", ["no better"], judged="a", against="1", fit=True) is None
    assert state(client) == before


def test_a_refused_version_that_is_fit_for_use_is_the_challenger_until_it_is_promoted(registry: str) -> None:
    client = promotion.opened()
    crown(client, "1")
    promotion.refuse(client, NAME, "2", ["not shown to be better"], judged="a", against="1", fit=True)
    assert promotion.aliases(client, NAME) == {"champion": "1", "challenger": "2"}
    promotion.refuse(client, NAME, "3", ["below the floor"], judged="b", against="1", fit=False)
    assert promotion.aliases(client, NAME) == {"champion": "1", "challenger": "2"}
    crown(client, "2", against="1")
    assert promotion.aliases(client, NAME) == {"champion": "2", "previous": "1"}


def test_rollback_restores_the_champions_one_after_the_other(registry: str) -> None:
    client = promotion.opened()
    for version, before in (("1", None), ("2", "1"), ("3", "2")):
        crown(client, version, against=before)
    promotion.rollback(client, NAME, "it calls everything happy")
    assert promotion.aliases(client, NAME) == {"champion": "2", "previous": "1"}
    undone = promotion.entries(client.get_model_version(NAME, "3").tags)[-1]
    assert undone.action == "rolled back"
    assert undone.reasons == ["it calls everything happy", "version 2 is champion again"]
    promotion.rollback(client, NAME, "so does this")
    assert promotion.aliases(client, NAME) == {"champion": "1"}
    with pytest.raises(HeadstartError, match="no earlier champion to go back to"):
        promotion.rollback(client, NAME, "and this")


def test_rollback_again_and_again_never_returns_to_what_it_undid(registry: str) -> None:
    client = promotion.opened()
    crown(client, "1")
    crown(client, "2", against="1")
    promotion.crown(client, NAME, "1", ["for a demo"], forced=True)
    promotion.rollback(client, NAME, "the demo is over")
    assert promotion.aliases(client, NAME) == {"champion": "2", "previous": "1"}
    promotion.rollback(client, NAME, "it calls everything happy")
    assert promotion.aliases(client, NAME) == {"champion": "1"}
    with pytest.raises(HeadstartError, match="no earlier champion to go back to"):
        promotion.rollback(client, NAME, "and this")


def test_a_version_that_was_deleted_is_passed_over_and_blocks_nothing(registry: str) -> None:
    client = promotion.opened()
    for version, against in (("1", None), ("2", "1"), ("3", "2")):
        crown(client, version, against)
    client.delete_model_version(NAME, "1")
    promotion.rollback(client, NAME, "wrong")  # version 1 would be previous now
    assert promotion.aliases(client, NAME) == {"champion": "2"}
    promotion.refuse(client, NAME, "4", ["no better"], judged="x", against="2", fit=True)

    # Of a change that a killed process had begun, with a version that is gone since.
    pending = {"entry": asdict(promotion.history(client, NAME)[-1]), "aliases": {"previous": "3"}}
    client.set_registered_model_tag(NAME, promotion.PENDING, json.dumps(pending))
    client.delete_model_version(NAME, "3")
    promotion.carry_through(client, NAME)
    assert promotion.aliases(client, NAME) == {"champion": "2", "challenger": "4"}
    pending["aliases"] = {"champion": "3", "previous": "2"}
    client.set_registered_model_tag(NAME, promotion.PENDING, json.dumps(pending))
    client.delete_model_version(NAME, "4")
    promotion.carry_through(client, NAME)
    assert promotion.aliases(client, NAME) == {"champion": "2"}
    assert promotion.PENDING not in client.get_registered_model(NAME).tags


RECIPE = cached.recipe(register={"name": NAME})


def judging(monkeypatch: pytest.MonkeyPatch, *promoted: bool, meanwhile: Callable[[], object] = int) -> None:
    """Let the gate say these things, one after the other, after something else has happened."""
    answers = iter(promoted)

    def compare(*asked: object, **how: object) -> Verdict:
        meanwhile()
        check = Check("min_gain", next(answers), "a gain")
        return Verdict(check.passed, (check,), {}, {})

    monkeypatch.setattr(trials, "compare", compare)


def test_what_happens_to_a_version_follows_from_what_was_decided_and_who_is_champion() -> None:
    def course(*actions: str, champion: str | None = "1", rival: str | None = "1", **how: Any) -> str:
        """Of version 2, about which these decisions were taken, the last of them on what is judged now."""
        gone, candidate, judged = (how.get(key) for key in ("gone", "candidate", "judged"))
        tags = {}
        for number, action in enumerate(actions, 1):
            entry = {"number": number, "at": "", "by": "", "action": action, "version": "2", "champion": None}
            entry |= {"reasons": [], "judged": judged or "now"}
            tags[f"{promotion.ENTRY}{number:06}"] = json.dumps(entry)
        present = trials.Situation("2", tags, candidate or "2", champion, rival, bool(gone))
        return trials.course(present, "now")

    gone: dict[str, Any] = {"champion": None, "gone": True}
    assert course() == "judge"
    assert course(champion=None, rival=None) == "judge"  # against the commonest class
    assert course(champion="2", rival="2") == "known"
    assert course("refused") == "known"
    assert course("refused", judged="earlier") == "judge"
    assert course("promoted", judged="earlier") == "judge"  # somebody else was crowned since
    assert course("promoted", "rolled back", judged="earlier") == "known"
    assert course(**gone) == "judge"  # against the one before
    assert course(rival="2", **gone) == course(rival=None, **gone) == "leave open"
    assert course("refused", rival=None, **gone) == "known"
    assert course("refused", judged="earlier", rival=None, **gone) == "leave open"
    assert course("promoted", rival="2", **gone) == "crown again"
    assert course("promoted", rival="1", judged="earlier", **gone) == "crown again"
    assert course("promoted", rival="2", candidate="3", **gone) == "known"
    assert course("promoted", rival="2", candidate="3", judged="earlier", **gone) == "leave open"
    assert course("promoted", "rolled back", rival="1", **gone) == "known"
    assert course("forced", rival="2", judged="earlier", **gone) == "leave open"


def test_a_version_rolled_back_from_while_it_is_judged_is_not_said_to_be_promoted(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = promotion.opened()
    crown(client, "1")

    def meanwhile() -> None:
        crown(client, "2", against="1")
        promotion.rollback(client, NAME, "it calls everything happy")

    judging(monkeypatch, True, meanwhile=meanwhile)
    decided = trials.decide(RECIPE, Layout(tmp_path, "case"), "2")
    assert not decided.new
    assert str(decided) == "moods version 2 was not promoted, version 1 stays champion"
    assert promotion.champion_of(client, NAME) == "1"


def test_a_version_that_was_forced_while_it_is_judged_is_said_to_be_the_champion(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = promotion.opened()
    crown(client, "1")
    forced = lambda: promotion.crown(client, NAME, "2", ["the boss says so"], forced=True)  # noqa: E731
    judging(monkeypatch, False, meanwhile=forced)
    assert str(trials.decide(RECIPE, Layout(tmp_path, "case"), "2")) == "moods version 2 is champion"
    assert [entry.action for entry in promotion.history(client, NAME)] == ["promoted", "forced"]


def test_what_the_gate_said_is_told_with_what_people_decided_since(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, layout = promotion.opened(), Layout(tmp_path, "case")
    crown(client, "1")
    judging(monkeypatch, True, False)

    def told(version: str) -> dict[str, Any]:
        evidence = trials.decide(RECIPE, layout, version).evidence
        assert evidence
        return {key: evidence[key] for key in ("promoted", "against", "action", "before", "champion")}

    said = {"promoted": True, "against": "1", "before": "1"}
    assert told("2") == said | {"action": "promoted", "champion": "2"}
    promotion.rollback(client, NAME, "it calls everything happy")
    assert told("2") == said | {"action": "rolled back", "before": "2", "champion": "1"}
    said["promoted"] = False
    assert told("3") == said | {"action": "refused", "champion": "1"}
    promotion.crown(client, NAME, "2", ["the audit wants it"], forced=True)
    promotion.crown(client, NAME, "3", ["the boss says so"], forced=True)
    assert told("3") == said | {"action": "forced", "before": "2", "champion": "3"}


def told(decided: trials.Decided, client: MlflowClient) -> tuple[str, dict[str, str]]:
    return str(decided), promotion.aliases(client, NAME)


def test_after_the_champion_is_deleted_nothing_that_was_refused_becomes_the_first(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, layout = promotion.opened(), Layout(tmp_path, "case")
    client.set_registered_model_alias(NAME, "candidate", "2")
    crown(client, "1")
    judging(monkeypatch, False)
    trials.decide(RECIPE, layout)
    client.delete_model_version(NAME, "1")
    for verb in ("is", "was"):
        said, aliases = told(trials.decide(RECIPE, layout), client)
        assert said.startswith(
            f"moods version 2 {verb} not promoted, there is no champion: the champion is gone"
        )
        assert "`headstart promote moods VERSION --force --because REASON`" in said
        assert aliases == {"candidate": "2", "challenger": "2"}
    assert [entry.action for entry in promotion.history(client, NAME)] == ["refused", "refused"]


def test_a_deleted_champions_predecessor_is_what_a_version_has_to_beat_and_where_a_rollback_leads(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, layout, asked = promotion.opened(), Layout(tmp_path, "case"), list[object]()
    crown(client, "1")
    crown(client, "2", against="1")
    client.delete_model_version(NAME, "2")
    judging(monkeypatch, False, True)
    compare = trials.compare
    monkeypatch.setattr(
        trials, "compare", lambda *given, **how: asked.append(given[2:]) or compare(*given, **how)
    )
    said, aliases = told(trials.decide(RECIPE, layout, "3"), client)
    assert said.startswith(
        "moods version 3 is not promoted, there is no champion: a gain; the champion is gone"
    )
    said, aliases = told(trials.decide(RECIPE, layout, "4"), client)
    assert said == "moods version 4 promoted to champion: a gain"
    assert asked == [("3", "1"), ("4", "1")]
    assert (aliases["champion"], aliases["previous"]) == ("4", "1")
    promotion.rollback(client, NAME, "it calls everything happy")
    assert promotion.champion_of(client, NAME) == "1"


def test_a_champion_whose_alias_was_taken_away_is_crowned_again_if_its_promotion_stands(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, layout = promotion.opened(), Layout(tmp_path, "case")
    client.set_registered_model_alias(NAME, "candidate", "1")
    judging(monkeypatch, True)
    trials.decide(RECIPE, layout)
    client.delete_registered_model_alias(NAME, "champion")
    _, aliases = told(trials.decide(RECIPE, layout), client)
    assert aliases == {"candidate": "1", "champion": "1"}
    assert not trials.decide(RECIPE, layout).new
    first, again = promotion.history(client, NAME)
    assert (first.action, again.action) == ("promoted", "promoted")
    assert again.reasons == ["its promotion stands, and no version was champion"]


def test_the_champion_before_that_is_crowned_by_hand_leads_nowhere_back(registry: str) -> None:
    client = promotion.opened()
    crown(client, "1")
    crown(client, "2", against="1")
    client.delete_model_version(NAME, "2")
    promotion.crown(client, NAME, "1", ["the boss says so"], forced=True)
    assert promotion.aliases(client, NAME) == {"champion": "1"}


def test_a_name_that_the_registry_does_not_know_is_answered_with_the_nearest(registry: str) -> None:
    with pytest.raises(HeadstartError, match="the registry has no model mood") as caught:
        promotion.known(promotion.opened(), "mood")
    assert caught.value.do == "did you mean moods?"


def test_reasons_too_long_for_a_tag_are_cut_not_refused(registry: str) -> None:
    client = promotion.opened()
    promotion.crown(client, NAME, "1", ["ж" * 90_000, "short"], forced=True)
    tags = client.get_model_version(NAME, "1").tags
    assert all(len(value) < 5_000 for value in tags.values())
    long, short = promotion.history(client, NAME)[0].reasons
    assert long.endswith("…") and len(long) < 5_000
    assert short == "short"


def test_a_model_that_was_registered_by_other_means_is_named(registry: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/MLmodel").write_text("flavors: {sklearn: {}}\n")
    promotion.opened().create_model_version(NAME, source=(tmp_path / "foreign").as_uri())
    with pytest.raises(HeadstartError, match="moods version 5 is no model that headstart registered"):
        models.load(NAME, "5")


def test_a_registry_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://user:secret@127.0.0.1:9")
    try:
        with pytest.raises(HeadstartError, match="cannot be reached") as caught:
            promotion.opened()
    finally:
        mlflow.set_tracking_uri(before)
    assert "127.0.0.1:9" in caught.value.where
    assert "secret" not in str(caught.value)


def killed_at(step: int, before: bool, uri: str, work: Callable[[MlflowClient], object]) -> None:
    """Do the work, and die just before or just after the store is written to for the nth time."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    client, steps = promotion.opened(), 0

    def deadly(write: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step and before:
                os.kill(os.getpid(), signal.SIGKILL)
            done = write(*given, **named)
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return called

    for name in dir(client):
        if name.startswith(("set_", "delete_")):
            setattr(client, name, deadly(getattr(client, name)))
    work(client)


WORK: dict[str, Callable[[MlflowClient], object]] = {
    "promote": lambda client: promotion.crown(client, NAME, "3", ["better"], against="2", judged="x"),
    "refuse": lambda client: promotion.refuse(client, NAME, "4", ["no"], judged="x", against="2", fit=True),
    "rollback": lambda client: promotion.rollback(client, NAME, "bad"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["promote", *(pytest.param(what, marks=pytest.mark.long) for what in ("refuse", "rollback"))]
)
def test_killed_at_any_write_the_same_command_ends_as_if_undisturbed(
    what: str, blank: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start.db"
    shutil.copy(blank, start)

    def prepare() -> None:
        client = opened(start)
        crown(client, "1")
        crown(client, "2", against="1")
        promotion.refuse(client, NAME, "3", ["not yet"], judged="y", against="2", fit=True)

    assert in_child(prepare) == 0
    states, disturbed = [], 0
    for step in range(40):  # step 0 is never reached: undisturbed
        for before in (True, False):
            path = tmp_path / f"{step}-{before}.db"
            shutil.copy(start, path)
            ended = in_child(lambda: killed_at(step, before, f"sqlite:///{path}", WORK[what]))  # noqa: B023
            if step and ended == 0:
                break
            disturbed += ended == -signal.SIGKILL

            def again() -> None:
                client = opened(path)  # noqa: B023
                if step and what == "rollback":  # noqa: B023
                    # Done or begun, a rollback is not done twice: begun it is carried through, and if
                    # the very last write was made there is nothing left that says it was begun.
                    if promotion.aliases(client, NAME)["champion"] == "2":
                        WORK[what](client)
                    elif client.get_registered_model(NAME).tags.get(promotion.PENDING):
                        promotion.carry_through(client, NAME)
                elif step:  # noqa: B023
                    WORK[what](client)
                (tmp_path / "state.json").write_text(repr(state(client)))

            assert in_child(again) == 0
            states.append((tmp_path / "state.json").read_text())
        else:
            continue
        break
    assert disturbed >= 8
    assert set(states) == {states[0]}


def opened(path: Path) -> MlflowClient:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{path}")
    return promotion.opened()


ROUNDS, PROCESSES = int(os.environ.get("HEADSTART_ROUNDS", "4")), 8


def promote_in_turns(uri: str, version: str, barrier: Any) -> None:
    """One of several processes: in every round all promote a version of their own at once."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    client = promotion.opened()
    for turn in range(ROUNDS):
        barrier.wait(300)
        promotion.crown(client, NAME, version, [f"round {turn}"], forced=True)


def watch(uri: str, over: Any, seen: Any) -> None:
    """Ask again and again who is champion; there must always be one."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    client = promotion.opened()
    while not over.is_set():
        champion = str(client.get_model_version_by_alias(NAME, "champion").version)
        seen[int(champion) - 1] += 1
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_eight_processes_that_promote_at_once_lose_no_decision_and_there_is_always_one_champion(
    store: str, tmp_path: Path
) -> None:
    if store == "postgresql":
        with postgres() as uri:
            promote_at_once(uri, tmp_path)
    else:
        promote_at_once(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path)


def promote_at_once(uri: str, tmp_path: Path) -> None:
    def prepare() -> None:
        import mlflow

        fill(uri, PROCESSES)
        mlflow.set_tracking_uri(uri)
        promotion.crown(promotion.opened(), NAME, "1", ["first"], forced=True)

    assert in_child(prepare) == 0
    barrier, over, seen = FORK.Barrier(PROCESSES), FORK.Event(), FORK.Array("i", PROCESSES)
    watcher = FORK.Process(target=watch, args=(uri, over, seen))
    promoters = [
        FORK.Process(target=promote_in_turns, args=(uri, str(n), barrier)) for n in range(1, PROCESSES + 1)
    ]
    for process in (watcher, *promoters):
        process.start()
    for process in promoters:
        process.join(600)
    over.set()
    watcher.join(30)
    assert [process.exitcode for process in (watcher, *promoters)] == [0] * (PROCESSES + 1)
    assert sum(seen) > 10
    result = FORK.Queue()

    def told() -> None:
        import mlflow

        mlflow.set_tracking_uri(uri)
        client = promotion.opened()
        decided = [(e.number, e.version, e.champion) for e in promotion.history(client, NAME)]
        result.put((decided, promotion.aliases(client, NAME), dict(client.get_registered_model(NAME).tags)))

    teller = FORK.Process(target=told)
    teller.start()
    decided, aliases, tags = result.get(timeout=120)
    teller.join(60)
    assert [number for number, _, _ in decided] == list(range(1, len(decided) + 1))
    # Each decision knows the champion that the one before it made: none was made beside another.
    champions = [version for _, version, _ in decided]
    assert [before for _, _, before in decided] == [None, *champions[:-1]]
    before = [version for version in champions if version != champions[-1]][-1]
    assert aliases == {"champion": champions[-1], "previous": before}
    assert promotion.PENDING not in tags
    assert len(decided) == ROUNDS * PROCESSES + 1
