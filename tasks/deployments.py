"""Deployments: what prefect.yaml describes, set up on the configured Prefect server.

Goes in: ``prefect.yaml`` and, if someone is to be told of things, an address. Comes out: a work pool,
deployments with their schedules and triggers, and one automation that notifies. A second
time changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast
from uuid import UUID

from headstart.errors import HeadstartError
from headstart.runs import POOL

if TYPE_CHECKING:
    from prefect.blocks.abstract import NotificationBlock
    from prefect.client.orchestration import SyncPrefectClient

NOTIFICATION = "headstart-notify"  # of the block and of the automation
TOLD = (
    "headstart.data.rejected",
    "headstart.drift.detected",
    "headstart.model.promoted",
    "headstart.gate.refused",
    "prefect.flow-run.Crashed",
    "prefect.flow-run.Failed",
    "prefect.flow-run.TimedOut",
)
SUBJECT = (
    "{{ event.resource['headstart.recipe'] or event.resource['prefect.resource.name'] }}: {{ event.event }}"
)
BODY = """\
{{ event.payload.reason or event.resource['prefect.state-message'] or 'no reason was given' }}

event: {{ event.event }}
{% if event.resource['headstart.recipe'] %}recipe: {{ event.resource['headstart.recipe'] }}
{% else %}flow run: {{ event.resource['prefect.resource.name'] }}
{% endif %}at: {{ event.occurred }}
"""


def deploy(root: Path, notify: str, say: Callable[[str], None]) -> None:
    """Set up the work pool, every deployment and, if asked to, the notifications.

    Raises:
        HeadstartError: no server is configured, none answers or not as Prefect's does, or prefect.yaml is not
            accepted.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    api = PREFECT_API_URL.value()
    if not api:
        raise HeadstartError(
            "no Prefect server is configured to deploy to",
            where="PREFECT_API_URL",
            do="run `headstart up`, or set it to your server's address, such as http://127.0.0.1:4200/api",
        )
    try:
        with get_client(sync_client=True) as client:
            _work_pool(client)
            if notify:
                _notify(client, notify)
                say(f"notifications: {_public(notify)}")
    except httpx.TransportError as error:
        raise HeadstartError(
            "the Prefect server does not answer",
            where=str(api),
            table=[str(error)],
            do="check PREFECT_API_URL and that its server is up",
        ) from error
    except (httpx.HTTPError, json.JSONDecodeError) as error:  # beside /api stands the server's page
        raise HeadstartError(
            "what answers is not Prefect's API, or lets nobody in without a password",
            where=f"PREFECT_API_URL {api}",
            table=str(error).splitlines(),
            do="check that it ends in /api, and PREFECT_API_AUTH_STRING",
        ) from error
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HeadstartError(
            "prefect.yaml could not be deployed",
            where=str(root / "prefect.yaml"),
            table=(done.stdout + done.stderr).splitlines()[-20:],
            do="mend what the lines above name",
        )
    with get_client(sync_client=True) as client:
        for line in _deployed(client):
            say(line)


def _work_pool(client: SyncPrefectClient) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        with contextlib.suppress(ObjectAlreadyExists):  # someone else was faster
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))


def _deployed(client: SyncPrefectClient) -> list[str]:
    """A line for each deployment of the work pool: its name, and when it runs."""
    from prefect.client.schemas.filters import WorkPoolFilter

    wanted = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    lines = []
    for each in client.read_deployments(work_pool_filter=wanted):
        flow = client.read_flow(each.flow_id).name
        when = [getattr(schedule.schedule, "cron", "") for schedule in each.schedules if schedule.active]
        lines.append(f"{flow}/{each.name}: {', '.join(when) or 'when asked'}")
    return sorted(lines)


def _notify(client: SyncPrefectClient, address: str) -> None:
    """One block that knows the address, and one automation that uses it; both as they should be."""
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    block = cast(UUID, _block(address).save(NOTIFICATION, overwrite=True))
    wanted = AutomationCore(
        name=NOTIFICATION,
        description="Tells people what headstart decided, and which runs failed.",
        trigger=EventTrigger(expect=set(TOLD), posture=Posture.Reactive, threshold=1),
        actions=[SendNotification(block_document_id=block, subject=SUBJECT, body=BODY)],
    )
    found = client.read_automations_by_name(NOTIFICATION)
    if not found:
        client.create_automation(wanted)
    elif AutomationCore.model_validate(found[0].model_dump()) != wanted:
        client.update_automation(found[0].id, wanted)


def _block(address: str) -> NotificationBlock:
    """Prefect's own block for an address: Apprise's, or any that takes JSON over HTTP.

    Raises:
        HeadstartError: it is neither.
    """
    from apprise import Apprise
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
    from prefect.types import SecretDict
    from pydantic import SecretStr

    if Apprise.instantiate(address) is not None:
        return SlackWebhook(url=SecretStr(address))  # hands any address to Apprise as it is
    if address.startswith(("http://", "https://")):
        return CustomWebhookNotificationBlock(
            name=NOTIFICATION,
            url="{{address}}",  # kept as a secret: whoever knows it can post there
            headers=None,
            cookies=None,
            json_data={"title": "{{subject}}", "text": "{{body}}"},
            secrets=SecretDict({"address": address}),
        )
    raise HeadstartError(
        "nobody can be notified at this address",
        where=_public(address),
        do="give one that Apprise knows, such as mailto://..., or a webhook's https:// address",
    )


def _public(address: str) -> str:
    """What may be printed of an address: any later part of it can be a secret."""
    scheme, separator, _ = address.partition("://")
    return f"{scheme}://..." if separator else address
