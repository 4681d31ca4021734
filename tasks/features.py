"""One pass of the frozen backbone over every row."""

from tasks.stage import stage_task

features = stage_task("features")
