"""Tables of text, as terminals, notebooks and Rich show them."""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

Row = Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header, with lines above and below them.

    Attributes:
      columns: The header; none if it is empty.
      rows: Cells, as many in each row as there are columns.
      title: Lines above.
      notes: Lines below.
    """

    columns: Row
    rows: Sequence[Row]
    title: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        body = aligned([row for row in (self.columns, *self.rows) if row])
        return "\n".join([*self.title, *body, *self.notes])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(x)}</th>" for x in self.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>"
            for row in self.rows
        )
        head = f"<thead><tr>{head}</tr></thead>" if head else ""
        table = f"<table>{head}<tbody>{rows}</tbody></table>" if head or rows else ""
        return _lines(self.title) + table + _lines(self.notes)

    def __rich__(self) -> Any:
        # Rich itself asks for this, so that it is there.
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(show_header=bool(self.columns))
        for i in range(len(self.columns) or max(map(len, self.rows), default=0)):
            made.add_column(Text(self.columns[i] if self.columns else ""))
        for row in self.rows:
            made.add_row(*map(Text, row))
        body = [made] if self.rows else []
        return Group(*map(Text, self.title), *body, *map(Text, self.notes))


def aligned(rows: Sequence[Row]) -> list[str]:
    """Lines of cells, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)
