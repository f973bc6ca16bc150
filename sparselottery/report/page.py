"""HTML: one page that needs nothing else, for a phone and for a desk."""

from __future__ import annotations

import base64
import html
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..analysis.figure import DPI, Figure

# Wide things (tables, code) scroll in boxes of their own, the page never does sideways. Nothing is loaded, no script runs.
STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --wash: #f6f8fa; --blue: #0072b2; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: #fff;
  max-width: 80rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 .75rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .5rem; }
a { color: var(--blue); }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.125rem; } .soft { color: var(--soft); font-size: .9375rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.facts div { background: var(--wash); border-radius: 8px; padding: .5rem .75rem; }
.facts dt { font-size: .8125rem; color: var(--soft); } .facts dd { margin: 0; font-weight: 600; }
nav ul { list-style: none; padding: 0; margin: .5rem 0 0; display: flex; flex-wrap: wrap; gap: .375rem; }
nav a { display: block; padding: .375rem .75rem; border: 1px solid var(--line); border-radius: 999px; font-size: .875rem;
  text-decoration: none; }
section, main > div { margin-top: 2.5rem; }
section { border-top: 1px solid var(--line); padding-top: 1.25rem; scroll-margin-top: .5rem; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; align-items: start; }
.pair > * { min-width: 0; }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; margin: 0 auto; }
.scroll { overflow: auto; max-height: 30rem; border: 1px solid var(--line); border-radius: 8px;
  /* a shadow at the right edge for as long as there is more to scroll to: the first, white, layer moves with the content */
  background: linear-gradient(to left, #fff 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, rgb(0 0 0 / .16), transparent) right / 1rem 100% no-repeat scroll; }
.scroll:focus-visible { outline: 2px solid var(--blue); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .8125rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3125rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.text { white-space: normal; min-width: 14rem; text-align: left; }
th { position: sticky; top: 0; z-index: 1; background: var(--wash); vertical-align: bottom; font-weight: 600;
  white-space: normal; min-width: 4.5rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; padding-left: .75rem; }
td:first-child { background: #fff; }
td.text:first-child { position: static; }
.two td:first-child { white-space: normal; min-width: 0; }
th:first-child { z-index: 2; }
tbody tr:last-child td { border-bottom: 0; }
pre { background: var(--wash); padding: .625rem .75rem; border-radius: 8px; font-size: .8125rem; line-height: 1.45;
  margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .9375rem; padding: .25rem 0; }
@media (min-width: 60rem) {
  body { padding: 2rem; }
  .pair { grid-template-columns: minmax(0, 9fr) minmax(0, 11fr); gap: 2rem; }
}
@media print { .scroll { max-height: none; overflow: visible; } nav { display: none; } section { break-inside: avoid; } }
"""
LARGEST = 1.2  # times the size a picture was drawn for
SHORT = 160  # characters of a command that is shown at once


@dataclass
class Section:
    """A figure and the command that made it (None: unknown)."""

    figure: Figure
    command: str | None


def page(
    *,
    title: str,
    lead: Sequence[str],
    facts: Sequence[tuple[str, str]],
    summary: str,
    sections: Sequence[Section],
    notes: Sequence[str],
    made: str | None,
    appendix: Mapping[str, Mapping],
) -> str:
    """The whole document. `summary` is HTML, everything else plain text."""
    parts = [f"<header><h1>{html.escape(title)}</h1>"]
    parts += [f'<p class="lead">{html.escape(text)}</p>' for text in lead]
    if facts:
        pairs = "".join(f"<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd></div>" for a, b in facts)
        parts.append(f'<dl class="facts">{pairs}</dl>')
    if len(sections) > 1:
        links = "".join(
            f'<li><a href="#{html.escape(s.figure.name)}">{html.escape(s.figure.title)}</a></li>' for s in sections
        )
        parts.append(f'<nav aria-label="Figures"><ul>{links}</ul></nav>')
    parts.append("</header><main>")
    if summary:
        parts.append(f"<div>{summary}</div>")
    parts += map(_section, sections)
    parts += [f'<p class="soft">{html.escape(note)}</p>' for note in notes]
    if made is not None:
        parts.append(f'<section id="made-by"><h2>Made by</h2><pre>{html.escape(made)}</pre></section>')
    parts.append("</main><footer>")
    for heading, content in appendix.items():
        if content:
            text = html.escape(json.dumps(content, indent=1))
            parts.append(f"<details><summary>{heading}</summary><pre>{text}</pre></details>")
    body = "\n".join([*parts, "</footer>"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _section(section: Section) -> str:
    figure = section.figure
    width, height = struct.unpack(">II", figure.png[16:24])
    data = base64.b64encode(figure.png).decode()
    widest = LARGEST * width * 96 / DPI  # CSS pixels
    says = html.escape(f"{figure.title}: {figure.caption}")
    image = (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'style="max-width:{widest:.0f}px" alt="{says}"></figure>'
    )
    numbers = table(figure.header, figure.rows, figure.title) if figure.rows else ""
    command = ""
    if section.command is not None:
        shown = " open" if len(section.command) <= SHORT else ""
        says = "<summary>the command that made it</summary>"
        command = f"<details{shown}>{says}<pre>{html.escape(section.command)}</pre></details>"
    return (
        f'<section id="{html.escape(figure.name)}"><h2>{html.escape(figure.title)}</h2>'
        f'<p class="soft">{html.escape(figure.caption)}</p>'
        f'<div class="pair">{image}<div>{numbers}{command}</div></div></section>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table in a box of its own that scrolls where it is too wide; long texts break."""
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    kind = "scroll two" if len(header) == 2 else "scroll"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{html.escape(label)}, table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    kind = ' class="text"' if len(text) > 40 else ""
    return f"<td{kind}>{html.escape(text)}</td>"
