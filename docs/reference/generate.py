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
        "Every choice of one use case in one YAML file, `recipes/NAME.yaml`, its name of lower-case",
        "letters, digits and hyphens. Each block bears the name of the stage that reads it. `ingest` to",
        "`evaluate` must be there, and `{}` takes all defaults of one; `register`, `promote` and `monitor`",
        "may be left out. An unknown key is an error, and so are keys that do not go together: the message",
        "says which, and why. Editors complete and check recipes with `recipes/recipe.schema.json`.",
    ]
    for name, field in recipe.Recipe.model_fields.items():
        block = typing.cast(type[BaseModel], field.annotation)
        lines += ["", f"## `{field.alias or name}`", "", _sentence(block.__doc__), ""]
        lines += ["| key | values | default | meaning |", "|---|---|---|---|", *_rows(block)]
    return "\n".join(lines) + "\n"


def _rows(block: type[BaseModel], prefix: str = "") -> list[str]:
    rows, schema = [], block.model_json_schema()["properties"]
    for key, field in block.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _rows(field.annotation, f"{prefix}{key}.")
            continue
        default = "required" if field.default is PydanticUndefined else f"`{json.dumps(field.default)}`"
        values = _values(schema[field.alias or key])
        rows.append(f"| `{prefix}{key}` | {values} | {default} | {_sentence(field.description)} |")
    return rows


BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
TYPES = {"integer": "a whole number", "number": "a number", "string": "a text"}


def _values(schema: dict[str, typing.Any]) -> str:
    """What may stand for a value, from its JSON schema; that null may as well goes without saying."""
    if "anyOf" in schema:
        return " or ".join(_values(part) for part in schema["anyOf"] if part.get("type") != "null")
    if named := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{value}`" for value in named)
    kind = schema["type"]
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "array":
        each, _, bounds = _values(schema["items"]).removeprefix("a ").partition(", ")
        return f"a list of {each}s{f', each {bounds}' if bounds else ''}"
    if kind == "object":
        return "a table"
    bounds = [f"{words} {schema[key]:.10g}" for key, words in BOUNDS.items() if key in schema]
    return ", ".join([TYPES[kind], *bounds])


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split()).replace("``", "`")


def cli_reference() -> str:
    """Every command's help, as Markdown."""
    group = typing.cast(click.Group, typer.main.get_command(cli.app))
    lines = ["# Command line", "", "`headstart --help` lists the commands; each has its own `--help`.", ""]
    lines += ["Before the command:", "", *_parameters(group), ""]
    for name, command in group.commands.items():
        lines += [f"## `headstart {name}`", "", _sentence(command.help), ""]
        lines += [f"`{_usage(name, command)}`", "", *_parameters(command), ""]
    return "\n".join(lines).rstrip() + "\n"


def _usage(name: str, command: click.Command) -> str:
    words = ["headstart", name]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            word = (parameter.name or "").upper() + ("..." if parameter.nargs == -1 else "")
            words.append(word if parameter.required else f"[{word}]")
    options = any(parameter.param_type_name == "option" for parameter in command.params)
    return " ".join([*words, *(["[OPTIONS]"] if options else [])])


def _parameters(command: click.Command) -> list[str]:
    lines = []
    for parameter in command.params:
        text = getattr(parameter, "help", None) or ""
        given = parameter.default
        default = f" Default: {given}." if isinstance(given, str | int) and given not in {"", False} else ""
        lines.append(f"- `{'`, `'.join(parameter.opts)}`: {text}{default}")
    return lines


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
