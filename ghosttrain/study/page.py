"""One page of HTML that needs nothing else: how it looks, its tables and its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem;
       color: #1b1b1b; background: #fff }
h1 { font-size: 1.35rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
img { width: 100%; max-width: 40rem; height: auto; display: block }
figure { margin: 1.5rem 0; break-inside: avoid }
figcaption, .note { color: #555; font-size: .9rem }
code { font-size: .8rem; overflow-wrap: anywhere }
li { margin: .4rem 0 }
@media print { body { max-width: none; font-size: 11px } .wide { overflow: visible }
               table { font-size: 9px } th, td { padding: .15rem .3rem } }
"""


def page(title: str, body: Sequence[str], style: str = "") -> str:
    """Return a page: `title`, which is escaped here, then the lines of `body` as they are."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *body,
            "</body></html>\n",
        ]
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first row is its head."""
    head, *body = [[html.escape(text) for text in row] for row in rows]
    return [
        '<div class="wide"><table><thead><tr>',
        "".join(f"<th>{text}</th>" for text in head),
        "</tr></thead><tbody>",
        *(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in body),
        "</tbody></table></div>",
    ]


def figure(png: bytes, about: str) -> str:
    """Return a picture with its caption."""
    about = html.escape(about)
    return (
        f'<figure><img alt="{about}" src="{data_url(png, "png")}"><figcaption>{about}</figcaption>'
        "</figure>"
    )


def data_url(content: bytes, kind: str) -> str:
    """Return a picture (`png`, `jpeg`) as a URL that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
