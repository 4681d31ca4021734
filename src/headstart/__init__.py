"""headstart: a new head on a pretrained start.

The library behind the stages: each turns files into files and imports neither
Prefect nor DVC. Nothing heavy is imported here; ``headstart --help`` stays fast.
"""

__version__ = "0.1.0"
