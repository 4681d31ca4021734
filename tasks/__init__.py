"""One module per step, each a thin Prefect task around the library and DVC."""
