"""A head on the features, its predictions, and stamps of what it was made from."""

from tasks.stage import stage_task

train = stage_task("train")
