"""The page of a report: one HTML file that needs nothing else, in light or dark as the reader's.

What comes from data is escaped where it is put in. A block is a piece of HTML.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Block = str


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        name: its anchor, a word.
        title: its heading.
        blocks: what it holds.
    """

    name: str
    title: str
    blocks: Sequence[Block]


STYLE = """
:root { --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #f6f8fa; --card: #ffffff;
  --link: #0969da; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --back: #0d1117; --card: #161b22;
    --link: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .3rem; }
p, figcaption, li, dd { max-width: 48rem; } a { color: var(--link); }
nav { margin: 1rem 0; } nav a { margin-right: 1rem; white-space: nowrap; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .9rem; min-width: 9rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
figure { margin: 1rem 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
caption { text-align: left; color: var(--soft); padding: .5rem .7rem; }
th, td { padding: .3rem .7rem; text-align: left; border-top: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.absent { color: var(--soft); border-left: 3px solid var(--line); padding-left: .8rem; }
.text { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem; font: 13px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; }
.text span { padding: .12em .08em; border-radius: 3px; white-space: pre-wrap; }
code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .2rem 0; } td { white-space: pre-wrap; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0 0 0 1rem; }
"""


def escape(value: Any) -> str:
    """Text for HTML, in content and in attributes."""
    return html.escape(str(value), quote=True)


def paragraph(text: str) -> Block:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> Block:
    """A heading below a section's."""
    return f"<h3>{escape(text)}</h3>"


def absent(text: str) -> Block:
    """Says why something is not here."""
    return f'<p class="absent">{escape(text)}</p>'


def tiles(facts: Mapping[str, str]) -> Block:
    """The few numbers to read first: values by what they are."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in facts.items()
    )
    return f'<div class="tiles">{inner}</div>'


def figure(light: bytes, dark: bytes, caption: str, alt: str) -> Block:
    """A figure in the reader's colours, with the sentences that explain it.

    Args:
        light: PNG for light pages.
        dark: PNG for dark ones.
        caption: plain sentences.
        alt: what it shows, for those who cannot see it.
    """
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
        f'<img src="{_inline(light)}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Block:
    """Rows as a table, a column a key in the order in which keys first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c: all(_is_number(row[c]) for row in rows if c in row) for c in columns}
    style = {c: ' class="number"' if numeric[c] else "" for c in columns}
    head = "".join(f"<th{style[c]}>{escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{style[c]}>{escape(cell(row.get(c)))}</td>" for c in columns)
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<tr>{head}</tr>{body}</table></div>'


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(item)}" for name, item in value.items())
    return str(value)


def tinted_text(pieces: Sequence[tuple[str, str, str]]) -> Block:
    """A text of which every piece has a background.

    Args:
        pieces: text, CSS colour, and what the reader is told who points at it.
    """
    inner = "<wbr>".join(
        f'<span style="background:{escape(color)}" title="{escape(title)}">{escape(text)}</span>'
        for text, color, title in pieces
    )
    return f'<div class="text">{inner}</div>'


def folded(title: str, blocks: Sequence[Block]) -> Block:
    """Blocks that a click on the title opens."""
    return f"<details><summary>{escape(title)}</summary>{''.join(blocks)}</details>"


def definitions(terms: Mapping[str, str]) -> Block:
    """A glossary."""
    inner = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in terms.items())
    return f"<dl>{inner}</dl>"


def page(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
        title: of the page.
        lead: what stands above the first section.
        sections: the rest, with links to them.
    """
    links = "".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{s.name}"><h2>{escape(s.title)}</h2>{"".join(s.blocks)}</section>\n'
        for s in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1>{''.join(lead)}<nav>{links}</nav>\n{body}</body></html>\n"
    )


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
