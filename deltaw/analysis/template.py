"""The one template of all pages (page.py fills it in), and how they look.

System fonts; text no wider than 42 rem; one accent, three tones for how something stands. Every colour is a variable
with a light and a dark value, each text at a contrast of 4.5 or more to its ground (a browser test computes it). On
paper it is always light, without navigation, and shows the details that were open. Under 40 rem columns become rows.
What is wider than the page scrolls, and a shade at its edge says that there is more.

A block's macro is called what its class is called, in lower case. Every word is escaped (autoescape) and made visible
(page.py's `finalize`); only `marked`, `breakable` and a picture's SVG bring tags along. A line end after `<pre>` is
dropped by HTML, so that one stands there before the words.

A string, not a file beside the code: it is found wherever the package is, also in a zip.
"""

PAGE = """<!DOCTYPE html>
{%- macro text(block) %}{{ block.words|paragraphs }}{% endmacro %}

{%- macro facts(block) -%}
<dl class="facts">
{%- for fact in block.facts -%}
<div><dt>{{ fact.label }}</dt><dd>{{ fact.value|cell }}</dd>
{%- if fact.note %}<dd class="note">{{ fact.note|marked }}</dd>{% endif %}</div>
{%- endfor -%}
</dl>
{%- endmacro %}

{%- macro table(block) -%}
<div class="wide" role="group" aria-label="{{ block.caption or "Table" }}" tabindex="0"><table>
{%- if block.caption %}<caption>{{ block.caption|marked }}</caption>{% endif -%}
<thead><tr>
{%- for name in block.head %}<th scope="col"{{ block.looks[loop.index0] }}>{{ name }}</th>{% endfor -%}
</tr></thead><tbody>
{%- for row in block.rows -%}
<tr>{% for cell in row %}<td{{ block.looks[loop.index0] }}>{{ cell|cell }}</td>{% endfor %}</tr>
{%- endfor -%}
</tbody></table></div>
{%- endmacro %}

{%- macro picture(block) -%}
<figure><div class="wide" role="img" aria-label="{{ block.alt }}" tabindex="0">{{ block.svg|safe }}</div>
{#- -#}
<figcaption>{{ block.caption|marked }}</figcaption><details><summary>The numbers</summary>{{ table(block.table) }}
{#- -#}
</details></figure>
{%- endmacro %}

{%- macro status(sign, word) -%}
<p class="status"><span class="badge" aria-hidden="true">{{ sign }}</span>{{ word }}</p>
{%- endmacro %}

{%- macro verdict(block) -%}
{%- set looks = {"held": ("good", "✓", "Held"), "did not hold": ("bad", "✕", "Did not hold"),
                 "not settled": ("doubt", "≈", "Not settled"), "void": ("plain", "–", "Void")} -%}
{%- set look, sign, word = looks[block.status] -%}
<div class="verdict {{ look }}">{{ status(sign, word) }}{{ block.words|paragraphs }}</div>
{%- endmacro %}

{%- macro findings(block) -%}
{%- set looks = {"ok": ("good", "✓", "OK"), "note": ("plain", "i", "Note"), "warning": ("doubt", "!", "Warning"),
                 "problem": ("bad", "✕", "Problem")} -%}
<ul class="findings">
{%- for level, words in block.findings -%}
{%- set look, sign, word = looks[level] -%}
<li class="{{ look }}">{{ status(sign, word) }}<p>{{ words|marked }}</p></li>
{%- endfor -%}
</ul>
{%- endmacro %}

{%- macro samples(block) -%}
{%- for sample in block.samples -%}
<dl class="sample{{ " two" if sample.truth is none }}">
{%- for look, name, words in (("prompt", "Prompt", sample.prompt), ("before", block.names[0], sample.before),
                              ("after", block.names[1], sample.after), ("truth", "Truth", sample.truth)) -%}
{%- if words is not none -%}
<div class="{{ look }}"><dt>{{ name }}</dt><dd>
{%- if words %}<pre>{{ "\n" }}{{ words }}</pre>{% else %}<em>empty</em>{% endif %}</dd></div>
{%- endif -%}
{%- endfor -%}
</dl>
{%- endfor -%}
{%- endmacro %}

{%- set macros = {"text": text, "facts": facts, "table": table, "picture": picture, "verdict": verdict,
                  "findings": findings, "samples": samples} %}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
<header><h1>{{ title }}</h1><p>{{ subtitle|marked }}</p></header>
{% if sections|length > 3 -%}
<nav aria-label="Contents"><ol>
{%- for name, section in sections %}<li><a href="#{{ name }}">{{ section.title }}</a></li>{% endfor -%}
</ol></nav>
{% endif -%}
<main>
{% for name, section in sections -%}
<section id="{{ name }}"><h2>{{ section.title }}</h2>
{%- for kind, blocks in section.blocks|groupby_kind %}
{%- if kind == "picture" %}<div class="row">{% endif %}
{%- for block in blocks %}{{ macros[kind](block) }}{% endfor %}
{%- if kind == "picture" %}</div>{% endif %}
{%- endfor %}</section>
{% endfor -%}
</main>
</body>
</html>
"""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c1f24;--muted:#5a616c;--line:#dde0e5;--panel:#f5f6f8;
--accent:#1d5fb8;--shade:#1c1f2433;--good:#17724a;--doubt:#855700;--bad:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--paper:#15171c;--ink:#e3e6eb;--muted:#9da5b1;--line:#2d323a;
--panel:#1d2027;--accent:#85b4ff;--shade:#000c;--good:#6ccb95;--doubt:#e3b35c;--bad:#ff8d83}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:2.5rem clamp(1rem,4vw,2.5rem) 5rem;max-width:64rem;background:var(--paper);color:var(--ink);
font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1,h2{line-height:1.25;letter-spacing:-.012em;text-wrap:balance;font-weight:650}
h1{font-size:clamp(1.5rem,1.1rem + 1.8vw,2.1rem);margin:0 0 .4rem}
h2{font-size:1.3rem;margin:0 0 1rem}
p{margin:0 0 1rem;max-width:42rem}
a{color:var(--accent);text-underline-offset:.18em;text-decoration-thickness:.07em}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;unicode-bidi:isolate}
code{font-size:.88em;background:var(--panel);border-radius:.3em;padding:.1em .35em;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
header p{color:var(--muted);margin:0}
section{margin-top:2.75rem;padding-top:2rem;border-top:1px solid var(--line);scroll-margin-top:0}
nav{font-size:.92rem;margin-top:1.5rem}
nav ol{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.3rem 1.4rem}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,9.25rem),1fr));gap:.75rem;margin:0 0 1.5rem}
.facts div{border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem}
.facts dt{color:var(--muted);font-size:.84rem;line-height:1.35}
.facts dd{margin:.2rem 0 0;font-size:1.45rem;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.facts .note{color:var(--muted);font-size:.84rem;font-weight:400;line-height:1.35}
.wide{overflow:auto;max-width:100%;background:linear-gradient(90deg,var(--paper) 30%,transparent) left/2.5rem 100%,
linear-gradient(270deg,var(--paper) 30%,transparent) right/2.5rem 100%,
linear-gradient(90deg,var(--shade),transparent) left/.9rem 100%,
linear-gradient(270deg,var(--shade),transparent) right/.9rem 100%;background-repeat:no-repeat;
background-attachment:local,local,scroll,scroll}
table{border-collapse:collapse;font-size:.9rem;line-height:1.4;font-variant-numeric:tabular-nums;margin-bottom:.25rem}
caption{text-align:left;color:var(--muted);padding-bottom:.5rem}
th,td{padding:.4rem 1.1rem .4rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);
overflow-wrap:normal;unicode-bidi:isolate}
td{max-width:28rem;overflow-wrap:anywhere;min-width:3rem}
td.long{min-width:11rem}
th:last-child,td:last-child{padding-right:.1rem}
th{font-weight:600;vertical-align:bottom;border-bottom-color:var(--muted)}
.number{text-align:right}
td.number{white-space:nowrap}
section>.wide{margin-bottom:1.5rem}
.row{display:flex;flex-wrap:wrap;gap:2rem 2.5rem;margin:0 0 1.75rem}
figure{margin:0;max-width:100%}
svg{display:block;font-family:inherit}
figcaption,details{width:0;min-width:100%}
figcaption{margin-top:.6rem;font-size:.9rem;line-height:1.5;color:var(--muted)}
details{margin-top:.4rem;font-size:.9rem}
summary{cursor:pointer;color:var(--accent);width:fit-content}
details .wide{max-height:26rem;margin-top:.6rem}
details td{padding-block:.22rem}
details thead th{position:sticky;top:0;background:var(--paper)}
.good{--tone:var(--good)}.plain{--tone:var(--accent)}.doubt{--tone:var(--doubt)}.bad{--tone:var(--bad)}
.status{display:flex;align-items:center;gap:.55rem;margin:0;font-weight:600;color:var(--tone)}
.badge{flex:none;display:grid;place-items:center;width:1.3rem;height:1.3rem;border-radius:50%;background:var(--tone);
color:var(--paper);font-size:.8rem;line-height:1;font-weight:700}
.badge,.verdict{print-color-adjust:exact}
.verdict{background:var(--panel);border-left:.3rem solid var(--tone);border-radius:.3rem .6rem .6rem .3rem;
padding:1.1rem 1.3rem;margin:0 0 1.5rem}
.verdict .status{font-size:1.25rem;margin-bottom:.4rem}
.verdict p:last-child{margin:0}
.findings{list-style:none;margin:0 0 1.5rem;padding:0}
.findings li{display:grid;align-items:start;grid-template-columns:7.5rem 1fr;gap:.1rem 1rem;padding:.7rem 0;
border-bottom:1px solid var(--line)}
.findings li:last-child{border:0}
.findings p{margin:0}
.sample{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));border:1px solid var(--line);border-radius:.6rem;
margin:0 0 1.25rem;overflow:hidden}
.sample.two{grid-template-columns:repeat(2,minmax(0,1fr))}
.sample div{padding:.8rem 1rem;min-width:0}
.sample .prompt{grid-column:1/-1;background:var(--panel);border-bottom:1px solid var(--line)}
.sample dt{color:var(--muted);font-size:.8rem;font-weight:600;margin-bottom:.25rem}
.sample dd{margin:0}
.sample em{color:var(--muted);font-size:.84rem}
pre{margin:0;font-size:.84rem;line-height:1.5;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;max-height:20rem;
overflow:auto}
@media (max-width:40rem){.facts div{padding:.7rem .8rem}.facts dd{font-size:1.25rem}
.findings li{grid-template-columns:1fr}.sample,.sample.two{grid-template-columns:1fr}}
@media (min-width:78rem){body:has(>nav){display:grid;grid-template-columns:12rem minmax(0,1fr);column-gap:3.5rem;
max-width:78rem}body:has(>nav)>*{grid-column:2}body>nav{grid-column:1;grid-row:1/span 2;position:sticky;top:2.5rem;
align-self:start;margin:.6rem 0 0}nav ol{flex-direction:column;gap:.55rem}}
@media print{html{font-size:10pt}body{max-width:none;padding:0}nav,details:not([open]){display:none}
.wide[role=img],figure:not(:has([open])),.facts div,.verdict,.findings li,tr{break-inside:avoid}
.row:has([open]){display:block}.row:has([open]) figure{margin-bottom:1.5rem}
h2,dt{break-after:avoid}pre,.wide,details .wide{max-height:none;overflow:visible;background:none}}
"""
