"""HTML elements: tables, figures, sections. Text that is not ours is escaped here or by `charts.text`."""

from collections.abc import Sequence
from dataclasses import dataclass

from clrun.reporting.charts import text


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        shown: text of the cell.
        value: value by which a column is sorted; None sorts last.
        kind: CSS class.
    """

    shown: str
    value: float | str | None = None
    kind: str = ""


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], *, kind: str = "", titles: Sequence[str] = ()) -> str:
    """Return a table that scrolls horizontally where it does not fit; the first cell of each row is its heading.

    Args:
        heads: headings of the columns.
        rows: cells of each row.
        kind: CSS classes; "sortable" turns the headings into buttons.
        titles: explanation of each heading, shown at the pointer.
    """
    titles = titles or [""] * len(heads)
    top = "".join(_head(head, title, kind) for head, title in zip(heads, titles, strict=True))
    body = "".join(
        f'<tr><th scope="row"{_sort(row[0])}>{text(row[0].shown)}</th>{"".join(map(_cell, row[1:]))}</tr>'
        for row in rows
    )
    whole = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide" tabindex="0">{whole}</div>'


def _head(head: str, title: str, kind: str) -> str:
    tip = f' data-t="{text(title)}"' if title else ""
    inner = f'<button type="button"{tip}>{text(head)}</button>' if "sortable" in kind else text(head)
    return f'<th scope="col">{inner}</th>'


def _cell(cell: Cell) -> str:
    kind = f' class="{cell.kind}"' if cell.kind else ""
    return f"<td{kind}{_sort(cell)}>{text(cell.shown)}</td>"


def _sort(cell: Cell) -> str:
    return "" if cell.value is None else f' data-v="{text(cell.value)}"'


def figure(picture: str, caption: str, numbers: str = "") -> str:
    """Return a figure with its caption and its numbers in a folded block; `picture` and `numbers` are HTML."""
    below = details("numbers", numbers) if numbers else ""
    return f"<figure>{picture}<figcaption>{text(caption)}</figcaption>{below}</figure>"


def details(summary: str, body: str, *, opened: bool = False) -> str:
    """Return a block that the reader can unfold; `body` is HTML."""
    return f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{body}</details>"


def section(title: str, body: str, *, kind: str = "") -> str:
    """Return a section with a heading; `body` is HTML."""
    return f'<section class="{kind}"><h2>{text(title)}</h2>{body}</section>'


def number(value: float | None, *, sign: bool = False) -> str:
    """Return a fraction in points with one decimal; a dash for None."""
    if value is None:
        return "–"
    shown = round(100 * value, 1) + 0.0
    return f"{shown:+.1f}" if sign else f"{shown:.1f}"


def count(value: float | None) -> str:
    """Return a whole number with separated thousands; a dash for None."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\N{THIN SPACE}")


def order_text(order: Sequence[int]) -> str:
    """Return the text of an order: task ids by position."""
    return " ".join(map(str, order))
