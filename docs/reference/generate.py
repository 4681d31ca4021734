"""Write what the reference repeats from the code: `make reference` runs it, a test compares.

Comes out: recipes/recipe.schema.json, docs/reference/recipe.md and docs/reference/cli.md below the
folder given as argument, by default the project's own.
"""

import json
import sys
import typing
from pathlib import Path

import click
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from headstart import cli, recipe

ROOT = Path(__file__).parents[2]


def recipe_reference() -> str:
    """Every block and key with its default and meaning, as Markdown."""
    lines = [
        "# Recipe",
        "",
        "Every choice of one use case in one YAML file, `recipes/NAME.yaml`. Each block bears the name of",
        "the stage that reads it. An unknown key is an error. `{}` takes all defaults of a block.",
        "Editors complete and check recipes with `recipes/recipe.schema.json`.",
    ]
    for name, field in recipe.Recipe.model_fields.items():
        block = typing.cast(type[BaseModel], field.annotation)
        lines += ["", f"## `{field.alias or name}`", "", _sentence(block.__doc__), ""]
        lines += ["| key | default | meaning |", "|---|---|---|", *_rows(block)]
    return "\n".join(lines) + "\n"


def _rows(block: type[BaseModel], prefix: str = "") -> list[str]:
    rows = []
    for key, field in block.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _rows(field.annotation, f"{prefix}{key}.")
            continue
        default = "required" if field.default is PydanticUndefined else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{prefix}{key}` | {default} | {_sentence(field.description)} |")
    return rows


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split()).replace("``", "`")


def cli_reference() -> str:
    """Every command's help, as Markdown."""
    group = typing.cast(click.Group, typer.main.get_command(cli.app))
    lines = ["# Command line", "", "`headstart --help` lists the commands; each has its own `--help`.", ""]
    for name, command in group.commands.items():
        lines += [f"## `headstart {name}`", "", _sentence(command.help), ""]
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            lines.append(f"- `{'`, `'.join(parameter.opts)}`: {text}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    pages = {
        "recipes/recipe.schema.json": json.dumps(recipe.json_schema(), indent=2) + "\n",
        "docs/reference/recipe.md": recipe_reference(),
        "docs/reference/cli.md": cli_reference(),
    }
    for name, text in pages.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
