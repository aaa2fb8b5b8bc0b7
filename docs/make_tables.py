"""Writes docs/tables.md from the schemas: ``python docs/make_tables.py``. A test says when the page is stale."""

from pathlib import Path

from milan_ray.schema import TABLES
from milan_ray.schema.table import Table

PAGE = Path(__file__).with_name("tables.md")

HEAD = """# Tables

<!-- Made by docs/make_tables.py from milan_ray/schema: do not edit. -->

A run directory holds these tables, each a folder of Parquet files under hive keys, as
`exemplars/model=resnet18%2Fimagenet/layer=layer4/data.parquet`; in a folder's name `/` is written `%2F`. The keys are
columns of the files too. File metadata has `milan_ray.config`, the hash of what made the file, and `milan_ray.parts`, a
digest per ingredient. Queries: [cookbook](cookbook.md).

"""


def section(noun: Table) -> str:
    """One table: what a row is, its keys, its columns."""
    rows = [
        f"| `{column.name}` | {column.type}{', may be null' if column.nullable else ''} | {cell(column.doc)} |"
        for column in noun.columns
    ]
    keys = ", ".join(f"`{key}`" for key in noun.partition)
    head = [f"## `{noun.name}`", "", cell(noun.doc), "", f"Partitioned by {keys}.", "", "| column | type | meaning |"]
    return "\n".join([*head, "|---|---|---|", *rows, ""])


def cell(text: str) -> str:
    """Text inside a table of Markdown."""
    return text.replace("|", "\\|")


def page() -> str:
    """The whole page."""
    index = [
        f"| [`{noun.name}`](#{noun.name}) | {cell(noun.doc.split('. ')[0].removesuffix('.'))} |" for noun in TABLES
    ]
    return HEAD + "\n".join(["| table | one row is |", "|---|---|", *index, "", *map(section, TABLES)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
