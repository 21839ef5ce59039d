"""Pieces of a self-contained HTML page: text made harmless, tables, figures as SVG, the page around them.

Nothing is fetched from anywhere. Figures have no ground and take the colour of the text, so that they read on light and
on dark.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the colour of the text while a figure is drawn
ON_PAGE = ContextVar("ON_PAGE", default=False)  # whether new figures are for `as_svg`, and nobody else may show them
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_TERMINAL = re.compile(
    "\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|.)?|\x9b[0-?]*[ -/]*[@-~]", re.DOTALL
)


def plain(value: object, most: int = 10_000) -> str:
    """A text of a file without what steers a terminal or hides something, of at most so many characters."""
    kept = "".join(c for c in _TERMINAL.sub("", str(value)) if c.isprintable() or c == "\n")
    return kept if len(kept) <= most else kept[: most - 1] + "…"


def text(value: object, most: int = 10_000) -> str:
    """The same for a page, between tags or in an attribute."""
    return html.escape(plain(value, most))


def number(value: Any, digits: int = 3) -> str:
    """A score for people; – where it is undefined."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return "–"
    small = 0 < abs(value) < 0.5 * 10**-digits
    return f"{value:.1e}" if small else f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{''.join(parts)}</section>\n"


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """A list of names and values; those that are None or empty are left out."""
    rows = [f"<dt>{text(name)}</dt><dd>{text(value, 2000)}</dd>" for name, value in pairs if value not in (None, "")]
    return f"<dl>{''.join(rows)}</dl>\n" if rows else ""


def bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{text(line, 2000)}</li>' for line in lines)}</ul>\n" if lines else ""


def table(caption: str, head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], sortable: bool = False) -> str:
    """A table in a box of its own that scrolls.

    Parameters
    ----------
    head
        (name, kind) of each column: "n" holds numbers, "l" labels, which are filtered by.
    rows
        Cells as HTML.
    sortable
        By a click on a column's name, where scripts run; and filtered.
    """
    cells = [f' class="{kind}"' if kind else "" for _, kind in head]
    names = "".join(f'<th scope="col"{cell}>{text(name)}</th>' for (name, _), cell in zip(head, cells, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{cell}>{value}</td>" for cell, value in zip(cells, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    kind, tools = (' class="sortable"', _FILTER) if sortable else ("", "")
    return (
        f'{tools}<div class="box" tabindex="0" role="region" aria-label="{text(caption)}"><table{kind}>'
        f"<caption><span>{text(caption)}</span></caption><thead><tr>{names}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def figure(svg: str, caption: str) -> str:
    return f'<figure><div class="box" tabindex="0">{svg}</div><figcaption>{text(caption)}</figcaption></figure>\n'


@contextmanager
def drawing() -> Iterator[None]:
    """Within it, matplotlib draws for `as_svg`: text as text, in the colour of the page, the same bytes every time."""
    from matplotlib import rc_context, rcParamsDefault

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "perturbdiff", "font.size": 9}
    style |= {**dict.fromkeys(ink, INK), **dict.fromkeys(clear, "none")}
    # Whatever a matplotlibrc says, the same run gives the same bytes.
    own: dict[Any, Any] = {k: v for k, v in rcParamsDefault.items() if not k.startswith(("backend", "interactive"))}
    with rc_context(own | style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page is read with other fonts
        token = ON_PAGE.set(True)
        try:
            yield
        finally:
            ON_PAGE.reset(token)


def as_svg(axes: Axes, prefix: str, alt: str) -> str:
    """The figure of some axes as an SVG element, also a file of its own: ids begin with `prefix`, read as `alt`."""
    buffer = BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawn = axes.get_figure(root=True)
    assert drawn is not None, "axes lie in a figure"
    drawn.savefig(buffer, format="svg", dpi=150, metadata=nothing)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):  # its rule would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(name, f"#{prefix}-{value[1:]}")
            else:
                element.set(name, value.replace("url(#", f"url(#{prefix}-").replace(INK, "currentColor"))
    root.set("role", "img")
    root.set("aria-label", plain(alt, 300))
    root.set("style", "stroke-linejoin:round;stroke-linecap:butt")
    return ET.tostring(root, encoding="unicode")


def page(title: str, body: str) -> str:
    """The whole file; scripts and styles are its own, and the browser is told to take no others."""
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title, 200)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


_FILTER = (
    '<p class="tools" hidden><label>Filter <input type="search" autocomplete="off" placeholder="part of a label">'
    "</label> <output></output></p>\n"
)
_STYLE = """
:root{--ground:#fff;--ink:#1c2024;--faint:#5b6570;--line:#d5dae0;--band:#f3f5f7;--mark:#0b61a4}
@media(prefers-color-scheme:dark){:root{--ground:#15181c;--ink:#e6e9ec;--faint:#a3adb8;--line:#39414a;--band:#1e2328;
--mark:#7cc0f4}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1180px;margin:auto;padding:1rem 14px 3rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:.5rem;
border-top:1px solid var(--line)}h3{font-size:1rem;margin:1.4rem 0 .3rem}
a{color:var(--mark)}p{margin:.4rem 0 .8rem;max-width:46rem}.verdict{font-size:1.15rem}.faint,figcaption,caption{
color:var(--faint);font-size:.875rem}
.box{overflow:auto;max-width:100%}.tools+.box{max-height:32rem}.box:focus-visible{outline:2px solid var(--mark)}
figure{margin:0;min-width:0}.figures{display:flex;flex-wrap:wrap;gap:1rem 1.5rem}
.figures figure{max-width:100%}svg{display:block}figcaption{max-width:21.5rem}
@media(prefers-color-scheme:dark){figure svg{filter:brightness(1.3)}}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;overflow-wrap:normal}
caption{text-align:left;padding:.2rem 0}
caption span{display:block;position:sticky;left:0;width:max-content;max-width:min(46rem,calc(100vw - 28px))}
th,td{padding:.3rem .6rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td{white-space:nowrap}td.l{white-space:normal;min-width:8rem;max-width:18rem;overflow-wrap:anywhere}
thead th{position:sticky;top:0;background:var(--band);vertical-align:bottom}.n{text-align:right;
font-variant-numeric:tabular-nums}td small{display:block;color:var(--faint);font-size:.78rem}
td:first-child{position:sticky;left:0;background:var(--ground)}thead th:first-child{left:0;z-index:1}
@media(max-width:40rem){td.l,td:first-child{min-width:5rem;max-width:9rem;white-space:normal}}
th button{all:unset;cursor:pointer;font-weight:inherit}th button:focus-visible{outline:2px solid var(--mark)}
th[aria-sort=ascending] button::after{content:" \\25B2"}th[aria-sort=descending] button::after{content:" \\25BC"}
input{font:inherit;color:inherit;background:var(--band);border:1px solid var(--faint);border-radius:4px;
padding:.25rem .5rem;max-width:60vw}
dl{display:grid;grid-template-columns:fit-content(min(12rem,38vw)) minmax(0,1fr);gap:.2rem 1rem;
margin:.4rem 0;font-size:.95rem}
dt{color:var(--faint)}dd{margin:0}
pre{overflow:auto;max-width:100%;max-height:24rem;background:var(--band);padding:.7rem;font-size:.8rem}
summary{cursor:pointer;color:var(--mark)}
@media print{.box,pre{max-height:none}.tools{display:none}}
"""
_SCRIPT = """
document.querySelectorAll('table.sortable').forEach(function (table) {
  const body = table.tBodies[0], rows = Array.from(body.rows), heads = Array.from(table.tHead.rows[0].cells);
  const tools = table.closest('.box').previousElementSibling;
  const input = tools.querySelector('input'), shown = tools.querySelector('output');
  const labels = rows.map(row => Array.from(row.querySelectorAll('.l'), c => c.textContent).join(' ').toLowerCase());
  const value = (row, i, numbers) => {
    const content = row.cells[i].textContent;
    return numbers ? parseFloat(content.replace(/,/g, '')) : content.toLowerCase();
  };
  heads.forEach(function (head, i) {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener('click', function () {
      const down = head.getAttribute('aria-sort') === 'ascending', numbers = head.classList.contains('n');
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const keyed = rows.map(row => [value(row, i, numbers), row]);
      keyed.sort(function ([a], [b]) {
        if (numbers && (isNaN(a) || isNaN(b))) return isNaN(a) - isNaN(b);
        return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
      });
      body.append(...keyed.map(([, row]) => row));
    });
  });
  const filter = function () {
    const wanted = input.value.trim().toLowerCase();
    let n = 0;
    rows.forEach(function (row, i) {
      row.hidden = !labels[i].includes(wanted);
      n += !row.hidden;
    });
    shown.textContent = n + ' of ' + rows.length;
  };
  input.addEventListener('input', filter);
  tools.hidden = false;
  filter();
});
"""
