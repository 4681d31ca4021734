"""The pretrained backbone becomes safetensors, with its spec."""

from tasks.stage import is_transient, stage_task

fetch = stage_task("fetch", retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=is_transient)
