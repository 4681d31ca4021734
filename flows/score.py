"""Score files with a registered model: what ``headstart predict`` does, run and recorded by Prefect.

Goes in: a model's name, inputs, and the file to write. Comes out: the file, whole or not at all, and an
artifact that counts rows, failures and labels. A second run writes the same file again.
"""

from __future__ import annotations

import re
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from flows.logs import in_words
from tasks.recovery import recoverable

in_words()


@flow(
    name="score",
    flow_run_name="score {model}@{version}",
    persist_result=False,
    retries=0,
    timeout_seconds=6 * 3600,
)
def score(
    model: str, inputs: list[str], output: str, version: str = "champion", column: str | None = None
) -> str:
    """Predict every row of the inputs, and say how it went.

    Args:
        model: a registered model.
        inputs: files, folders or patterns, relative to the project.
        output: a CSV, JSONL or Parquet file; one that is there is replaced.
        version: a number or an alias.
        column: of tables, what the model looks at; by default ``text``, or ``image`` or else ``path``.

    Raises:
        HeadstartError: as of ``scoring.score`` and ``models.load``; the output is as it was.
    """
    with recoverable():
        return _score(model, inputs, output, version, column)


def _score(model: str, inputs: list[str], output: str, version: str, column: str | None) -> str:
    from headstart import models, scoring

    loaded = models.load(model, version)
    done = scoring.score(loaded, inputs, Path(output), column)
    said = f"{model} version {loaded.version}: {done}; see {output}"
    get_run_logger().info(said)
    named = done.rows - done.errors
    create_table_artifact(
        key=f"score-{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}",
        table=[
            {"what": "rows", "count": done.rows, "share": ""},
            {"what": "failed", "count": done.errors, "share": f"{done.errors / max(1, done.rows):.1%}"},
            *(
                {"what": label or "undecided", "count": count, "share": f"{count / named:.1%}"}
                for label, count in done.labels.most_common()
            ),
        ],
        description=said,
    )
    return said
