"""A self-contained page that shows a three-dimensional map and can be turned with the pointer; nothing is fetched."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence

from expunge.analysis.tsne import Projection
from expunge.files import atomic_write
from expunge.report.model import clean
from expunge.report.svg import class_colours

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
body { margin:0; font:15px/1.5 system-ui,sans-serif; color:#1d242c; display:flex; flex-wrap:wrap; }
canvas { width:min(100vw,40rem); height:min(100vw,40rem); touch-action:none; cursor:grab; }
aside { padding:1rem 1.4rem; max-width:18rem; } h1 { font-size:1.2rem; overflow-wrap:anywhere; }
li { list-style:none; } ul { padding:0; } i { display:inline-block; width:.7em; height:.7em; border-radius:50%;
margin-right:.5em; } p { color:#59626c; font-size:.9rem; }
</style></head><body>
<canvas id="view" width="1000" height="1000" aria-label="Map of the embeddings"></canvas>
<aside><h1>@TITLE@</h1><p>@ABOUT@</p><ul>@LEGEND@</ul>
<p>Drag to turn, arrow keys too. Crosses are class prototypes@FORGET@.</p></aside>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const d = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("view"), c = canvas.getContext("2d");
let yaw = 0.6, pitch = 0.35, drag = null, spin = !matchMedia("(prefers-reduced-motion: reduce)").matches;
function place(p) {
  const v = p.map((x, k) => 2 * (x - d.low[k]) / (d.high[k] - d.low[k]) - 1);
  const a = v[0] * Math.cos(yaw) - v[1] * Math.sin(yaw), b = v[0] * Math.sin(yaw) + v[1] * Math.cos(yaw);
  const depth = b * Math.cos(pitch) - v[2] * Math.sin(pitch), up = b * Math.sin(pitch) + v[2] * Math.cos(pitch);
  const f = 1 / (1 + 0.15 * depth);
  return [500 + 290 * a * f, 500 - 290 * up * f, depth, f];
}
function draw() {
  c.clearRect(0, 0, 1000, 1000);
  const all = d.points.map((p, i) => [place(p), d.labels[i], d.forget[i], 0])
    .concat(d.prototypes.map((p, k) => [place(p), k, 0, 1]));
  all.sort((a, b) => b[0][2] - a[0][2]);
  for (const [[x, y, z, f], label, forget, proto] of all) {
    c.globalAlpha = proto ? 1 : Math.max(0.35, Math.min(1, 0.8 - 0.25 * z));
    c.fillStyle = c.strokeStyle = d.colours[label];
    if (proto) {
      for (const [width, ink] of [[10, "#000"], [6, d.colours[label]]]) {
        c.lineWidth = width; c.strokeStyle = ink; c.beginPath();
        c.moveTo(x - 9, y - 9); c.lineTo(x + 9, y + 9); c.moveTo(x - 9, y + 9); c.lineTo(x + 9, y - 9); c.stroke();
      }
    } else {
      c.beginPath(); c.arc(x, y, (forget ? 7.5 : 5.5) * f, 0, 7); c.fill();
      if (forget) { c.lineWidth = 1.8; c.strokeStyle = "#000"; c.stroke(); }
    }
  }
}
canvas.onpointerdown = e => { drag = [e.clientX, e.clientY]; spin = false; canvas.setPointerCapture(e.pointerId); };
canvas.onpointerup = () => { drag = null; };
canvas.onpointermove = e => {
  if (!drag) return;
  yaw += (e.clientX - drag[0]) / 150; pitch += (e.clientY - drag[1]) / 150; drag = [e.clientX, e.clientY]; draw();
};
addEventListener("keydown", e => {
  const step = {ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1]}[e.key];
  if (step) { spin = false; yaw += step[0]; pitch += step[1]; draw(); e.preventDefault(); }
});
function turn() { if (spin) { yaw += 0.006; draw(); requestAnimationFrame(turn); } }
draw(); turn();
</script></body></html>
"""


def page(projection: Projection, ranges: Sequence[tuple[float, float]]) -> str:
    """The page as text. Names are escaped; the data cannot end their script element."""
    e, s = projection.embedding, projection.settings
    colours = class_colours(len(e.classes))
    data = {
        "points": projection.points.round(4).tolist(),
        "prototypes": projection.prototypes.round(4).tolist(),
        "labels": e.labels.tolist(),
        "forget": e.forget.int().tolist(),
        "colours": colours,
        "low": [r[0] for r in ranges],
        "high": [r[1] for r in ranges],
    }
    about = f"{len(e)} {e.role} samples, joint t-SNE of {len(s['models'])} models, perplexity {s['perplexity']:g}"
    legend = "".join(
        f'<li><i style="background:{c}"></i>{html.escape(clean(n, 60))}</li>'
        for n, c in zip(e.classes, colours, strict=True)
    )
    parts = {
        "@TITLE@": html.escape(clean(projection.name, 100)),
        "@ABOUT@": html.escape(about),
        "@LEGEND@": legend,
        "@FORGET@": "; ringed samples were to be forgotten" if bool(e.forget.any()) else "",
        "@DATA@": json.dumps(data).replace("<", "\\u003c"),
    }
    return re.sub("|".join(parts), lambda m: parts[m.group(0)], _PAGE)


def save_page(projection: Projection, ranges: Sequence[tuple[float, float]], path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    atomic_write(path, page(projection, ranges))
