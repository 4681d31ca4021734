"""What deploy/ describes holds together: the services, the image, the job templates, and the page on them."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
TEXT = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PAGE = (ROOT / "docs/how-to/production.md").read_text(encoding="utf-8")
TEMPLATES = {name: json.loads((DEPLOY / f"{name}.json").read_text()) for name in ("docker", "kubernetes")}


def test_every_variable_of_compose_is_explained() -> None:
    names = {name for service in SERVICES.values() for name in service["environment"]}
    names |= set(re.findall(r"\$\{(\w+)", TEXT))
    assert not {name for name in names if f"`{name}`" not in PAGE}


def test_the_example_sets_what_compose_asks_for() -> None:
    example = (DEPLOY / "example.env").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)=.", example, re.MULTILINE)) == set(re.findall(r"\$\{(\w+)", TEXT))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_watched_and_waits_for_what_it_calls(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[\w/]+:(\d+(\.\d+)+|local)", service["image"])
    assert service["image"].endswith(":local") == ("build" in service)
    assert service["healthcheck"]["test"][0] == "CMD"
    values = " ".join(map(str, service["environment"].values()))
    called = set(re.findall(rf"(?://|@)({'|'.join(SERVICES)}):", values))
    known = set(service.get("depends_on", ()))
    # What the servers that it waits for have waited for is up as well.
    assert called <= known | {each for other in known for each in SERVICES[other].get("depends_on", ())}
    assert known <= set(SERVICES)


def test_a_worker_made_anew_is_the_same_machine_whose_dead_runs_it_settles() -> None:
    assert SERVICES["worker"]["hostname"] == "worker"


def test_what_is_kept_has_a_volume_and_nothing_listens_beyond_this_machine() -> None:
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", ())]
    assert {mount.partition(":")[0] for mount in mounts} - {".."} == set(COMPOSE["volumes"])
    used = [config["source"] for service in SERVICES.values() for config in service.get("configs", ())]
    assert used == list(COMPOSE["configs"])
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports and all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in ports)


def test_the_image_holds_what_its_file_copies() -> None:
    build = SERVICES["worker"]["build"]
    file = DEPLOY / build["context"] / build["dockerfile"]
    recipe = file.read_text(encoding="utf-8")
    assert re.search(r"^FROM [\w-]+:\d+\.\d+\.\d+\S*$", recipe, re.MULTILINE)
    let_in = re.findall(r"^!(.+)$", file.with_name(f"{file.name}.dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in let_in)
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'"(README.md|LICENSE)"', declared)
    assert {"requirements.lock", "pyproject.toml", "src", *named} <= set(let_in)
    assert re.search(r"^WORKDIR /srv/headstart$", recipe, re.MULTILINE)
    assert "..:/srv/headstart" in SERVICES["worker"]["volumes"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_job_template_uses_the_variables_that_it_has_and_their_defaults_fit(name: str) -> None:
    template = TEMPLATES[name]
    schema = template["variables"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(schema["properties"])
    jsonschema.Draft202012Validator.check_schema(schema)
    defaults = {key: each["default"] for key, each in schema["properties"].items() if "default" in each}
    given = defaults | {key: "given" for key in schema.get("required", ()) if key not in defaults}
    jsonschema.validate(given, schema)
    assert all(f"`{variable}`" in PAGE for variable in defaults["env"])


@pytest.mark.parametrize("wanted", [{}, {"gpus": "2"}])
def test_a_job_gets_the_gpus_that_are_asked_for_and_none_otherwise(wanted: dict[str, str]) -> None:
    from prefect.utilities.templating import apply_values

    template = TEMPLATES["kubernetes"]["job_configuration"]["job_manifest"]
    made = apply_values(template, {"memory_limit": "8Gi"} | wanted)["spec"]["template"]["spec"]
    (container,) = made["containers"]
    limits = {"memory": "8Gi"} | ({"nvidia.com/gpu": wanted["gpus"]} if wanted else {})
    assert container["resources"]["limits"] == limits
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        each["name"] for each in made["volumes"]
    }
