"""Raw files become a manifest, or a table of reasons why not."""

from tasks.stage import stage_task

validate = stage_task("validate")
