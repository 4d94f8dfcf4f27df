"""Plain HTML pages: one file without scripts that opens anywhere."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["figure", "page", "table"]

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem}"
    "figure{margin:2rem 0}img{max-width:100%}"
    "table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid #ccc;text-align:left}"
)


def page(title: str, sections: Iterable[str]) -> bytes:
    """A page with that heading; sections are HTML."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{title}</h1>\n" + "\n".join(sections) + "\n</html>\n"
    ).encode()


def figure(file: str, caption: str) -> str:
    """A picture, by its address from the page, with a caption."""
    text = html.escape(caption)
    return f'<figure><img src="{html.escape(file)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>\n"

    return "<table>\n" + cells("th", columns) + "".join(cells("td", row) for row in rows) + "</table>"
