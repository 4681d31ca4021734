"""Saved predictions become metrics with intervals, plots and a summary."""

from tasks.stage import stage_task

evaluate = stage_task("evaluate")
