"""The pretrained backbone becomes safetensors, with its spec."""

from tasks.stage import PATIENT, stage_task

fetch = stage_task("fetch", **PATIENT)
