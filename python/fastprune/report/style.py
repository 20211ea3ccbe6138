"""The style of the report's page: light and dark, on screens from a phone's on, and on paper."""

from __future__ import annotations

STYLE = """
:root { --page: #fbfbf9; --ink: #1b1b19; --soft: #5d5c57; --edge: #dddbd4; --sparse: #2b76de;
  --dense: #8d8b84; --kept: #d06c10; }
@media (prefers-color-scheme: dark) { :root { --page: #171716; --ink: #ebeae6; --soft: #a7a59d;
  --edge: #3a3934; --dense: #7d7b74; } }
@media print { :root { --page: #fff; --ink: #000; --soft: #444; --edge: #bbb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid var(--edge); }
code { font: .88em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.note, .key, small { color: var(--soft); }
.note { max-width: 75ch; }
.tiles { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 1px; margin: 24px 0 0; padding: 0; background: var(--edge); border: 1px solid var(--edge); }
.tiles li { background: var(--page); padding: 12px 16px; }
.tiles span, .tiles small { display: block; color: var(--soft); font-size: .85rem; }
.tiles strong { display: block; font-size: 1.6rem; font-weight: 600; line-height: 1.25; }
.scroll { overflow-x: auto; margin: 16px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums lining-nums; }
table.wide, table.text { width: auto; min-width: min(100%, 34rem); }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding: 0 0 6px; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--edge); vertical-align: baseline;
  white-space: nowrap; }
thead th { font-weight: 600; font-size: .88rem; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 400; }
table.text td, table.text th { text-align: left; white-space: normal; }
.none { color: var(--soft); }
table.bars td:has(.bar) { width: 34%; min-width: 110px; }
table.bars th { white-space: normal; }
table.bars th small { display: block; }
.bar { display: block; height: 9px; margin: 2px 0; }
.bar i { display: block; height: 100%; min-width: 1px; background: var(--sparse); }
.bar.dense i { background: var(--dense); }
.key .bar { display: inline-block; width: 26px; margin: 0 4px 0 0; }
.key .bar i { width: 100%; }
.charts, .maps, .pair { display: grid; gap: 28px 36px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .92rem; margin-bottom: 8px; }
.chart figcaption { font-weight: 600; }
.chart small { font-weight: 400; }
.plot { padding: 18px 14px 54px 52px; }
.plot svg { display: block; overflow: visible; }
svg text { font-size: 12px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.tick, svg text.limit { fill: var(--soft); }
svg text.value { font-weight: 600; }
svg text.value, svg text.limit { paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
.grid { stroke: var(--edge); }
.limit { stroke: var(--soft); stroke-dasharray: 5 4; }
svg text.limit { stroke-dasharray: none; }
.line { stroke: var(--sparse); stroke-width: 2; }
.point { fill: var(--sparse); stroke: var(--page); stroke-width: 1.5; }
.point.hollow { fill: var(--page); stroke: var(--soft); stroke-width: 2; }
.heat figcaption { color: var(--soft); font-size: .84rem; }
.heat code { display: block; color: var(--ink); font-size: .95rem; }
.panels { display: grid; grid-template-columns: 1fr 1fr; gap: 6px 16px; }
.panels.stacked { grid-template-columns: 1fr; }
.panel { font-size: .78rem; color: var(--soft); }
.map { border: 1px solid var(--edge); margin: 2px 0; }
.map img { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.ramp { display: inline-block; width: 90px; height: 10px; margin: 0 4px; border: 1px solid var(--edge); }
.ramp.rank { background: linear-gradient(to right, rgb(43 118 222 / 14%), rgb(43 118 222)); }
.ramp.kept { background: linear-gradient(to right, rgb(208 108 16 / 0%), rgb(208 108 16)); }
.key > span { display: inline-block; margin-right: 18px; }
@media (max-width: 600px) {
  main { padding: 20px 14px 40px; }
  table { font-size: .84rem; }
  th, td { padding: 5px 6px; }
  table.wide th, table.bars th { white-space: normal; }
  table.wide { width: 100%; font-size: .78rem; }
  table.wide th, table.wide td { padding: 5px 4px; }
  table.wide td:last-child { white-space: normal; }
  table.bars td:has(.bar) { min-width: 60px; width: 22%; }
  table.bars td { white-space: normal; }
  table.bars td data { white-space: nowrap; }
}
@media print {
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  table { font-size: .74rem; }
  th, td { padding: 3px 5px; }
  .bar i, .ramp, .tiles { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .tiles { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""
