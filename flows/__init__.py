"""Flows join tasks, nothing else."""
