"""The page of a report: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, StrictUndefined


@dataclass(frozen=True)
class Image:
    """A figure: its file name, base64 PNG, description for those who cannot see it, and caption."""

    name: str
    data: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Cells are text; columns from ``numeric_from`` on are aligned as numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric_from: int = 99
    caption: str = ""


@dataclass
class Section:
    """A heading with figures, tables, and sentences; ``notes`` stand out."""

    title: str
    id: str
    text: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def render(title: str, summary: Sequence[str], sections: Sequence[Section], footnotes: Sequence[str]) -> str:
    """The page as HTML; every text is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_PAGE).render(
        title=title, summary=summary, sections=sections, footnotes=footnotes, css=_CSS
    )


_CSS = """
:root{--ink:#1c2126;--soft:#59636e;--line:#dfe3e8;--page:#fff;--card:#f6f8fa;--note:#fff6dd;--edge:#c08a00;--link:#0b5cad}
@media (prefers-color-scheme:dark){:root{--ink:#e7eaee;--soft:#a2adb9;--line:#333b45;--page:#14181d;--card:#1c2229;
--note:#2d2715;--edge:#d9a521;--link:#7db8f5}figure img{background:#fff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2.2rem 1.1rem 4rem;max-width:64rem;background:var(--page);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:clamp(1.5rem,4.5vw,2.1rem);line-height:1.2;margin:0 0 .4rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:3rem 0 .7rem;padding-top:.9rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:46rem}
.summary{color:var(--soft)}
nav{margin:1.2rem 0 0;display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.93rem}
a{color:var(--link);text-underline-offset:.2em}
a:focus-visible,.scroll:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.figures{display:grid;gap:1.1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
figure{margin:.6rem 0;padding:.7rem;background:var(--card);border:1px solid var(--line);border-radius:10px}
figure img{display:block;width:100%;max-width:44rem;height:auto;margin:0 auto;border-radius:5px}
figcaption{margin:.6rem .2rem 0;font-size:.88rem;color:var(--soft);line-height:1.45}
.scroll{overflow-x:auto;margin:.9rem 0;border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.91rem}
caption{text-align:left;color:var(--soft);padding:.6rem .8rem;font-size:.88rem;border-bottom:1px solid var(--line)}
th,td{padding:.42rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{background:var(--card);font-weight:600;white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
tbody th{font-weight:600}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.note{background:var(--note);border-left:4px solid var(--edge);padding:.55rem .9rem;border-radius:4px;font-size:.94rem}
ol{padding-left:1.3rem;max-width:46rem}li{margin:.45rem 0}
@media print{body{max-width:none}figure,.scroll{break-inside:avoid}nav{display:none}}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ css|safe }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
{% for line in summary %}
<p class="summary">{{ line }}</p>
{% endfor %}
<nav aria-label="Contents">
{% for section in sections %}
<a href="#{{ section.id }}">{{ section.title }}</a>
{% endfor %}
<a href="#how">How the numbers were computed</a>
</nav>
</header>
<main>
{% for section in sections %}
<section id="{{ section.id }}">
<h2>{{ section.title }}</h2>
{% for line in section.text %}
<p>{{ line }}</p>
{% endfor %}
{% for line in section.notes %}
<p class="note" role="note">{{ line }}</p>
{% endfor %}
{% if section.images %}
<div class="figures">
{% for image in section.images %}
<figure>
<img src="data:image/png;base64,{{ image.data }}" alt="{{ image.alt }}">
<figcaption>{{ image.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
{% for table in section.tables %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.caption or section.title }}">
<table>
{% if table.caption %}
<caption>{{ table.caption }}</caption>
{% endif %}
<thead><tr>
{% for cell in table.head %}
<th scope="col"{% if loop.index0 >= table.numeric_from %} class="n"{% endif %}>{{ cell }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
{% if loop.first %}
<th scope="row">{{ cell }}</th>
{% else %}
<td{% if loop.index0 >= table.numeric_from %} class="n"{% endif %}>{{ cell }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
</section>
{% endfor %}
<section id="how">
<h2>How the numbers were computed</h2>
<ol>
{% for line in footnotes %}
<li>{{ line }}</li>
{% endfor %}
</ol>
</section>
</main>
</body>
</html>
"""
