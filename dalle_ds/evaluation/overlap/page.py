"""The page on which a person looks at pairs and chooses the threshold: one file, that works without a network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle_ds.data.images import Pixels
from dalle_ds.files import write_text

_SHOWN_SIDE = 192
"""Longest side in pixels of a picture on the page; larger ones shrink."""


@dataclass(frozen=True)
class Pair:
    """A validation picture and the training picture that is most similar to it; pictures as `data_uri` gives them."""

    row: int
    nearest: int
    similarity: float
    picture: str
    nearest_picture: str
    name: str
    nearest_name: str
    caption: str
    nearest_caption: str


def write_page(
    path: Path,
    about: dict[str, Any],
    rows: npt.NDArray[np.int64],
    similarity: npt.NDArray[np.float64],
    pairs: Sequence[Pair],
    threshold: float | None,
) -> None:
    """Write the page.

    Args:
        about: what stands in overlap.json besides threshold and rows; the page saves it with both.
        rows, similarity: of all validation pictures, (N,).
        pairs: those that are shown, the most similar first.
        threshold: where the slider stands at first; None puts it in the middle of the pairs.
    """
    if threshold is None:
        threshold = pairs[len(pairs) // 2].similarity if pairs else 1.0
    content = {
        "about": about,
        "rows": rows.tolist(),
        "similarity": similarity.tolist(),
        "threshold": threshold,
        "pairs": [
            {
                "row": pair.row,
                "nearest": pair.nearest,
                "similarity": pair.similarity,
                "pictures": [pair.picture, pair.nearest_picture],
                "names": [pair.name, pair.nearest_name],
                "captions": [pair.caption, pair.nearest_caption],
            }
            for pair in pairs
        ],
    }
    # Captions come from anywhere. The script puts them in as text; here, nothing in them may end the element they are in.
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    write_text(path, PAGE.replace("@CONTENT@", text))


def data_uri(pixels: Pixels) -> str:
    """A picture for the page, with the address in it that shows it."""
    image = Image.fromarray(pixels)
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) < _SHOWN_SIDE:
        image.save(buffer, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    image.save(buffer, format="JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Overlap: pairs</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 0 auto 4em; padding: 0 1em; }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: .6em 0; }
h1 { font-size: 1.2em; margin: 0; } p { margin: .3em 0; }
#bars { display: flex; align-items: flex-end; height: 48px; gap: 1px; } #bars i { flex: 1; background: #bbb; }
#bars i.above { background: #c33; } #slider { width: 100%; margin: 0; } #number { width: 7em; }
.pair { display: flex; align-items: center; gap: 1em; padding: .5em; border-bottom: 1px solid #eee;
border-left: 6px solid #c33; }
.pair.below { border-left-color: #ddd; background: #fafafa; }
.pair figure { margin: 0; width: 200px; align-self: flex-start; font-size: 12px; overflow-wrap: anywhere; }
.pair img { width: 128px; height: 128px; object-fit: contain; background: #f4f4f4; }
.cosine { font-variant-numeric: tabular-nums; width: 5em; }
button[aria-pressed=true] { background: #246; color: #fff; } .wrong .cosine { color: #c33; font-weight: bold; }
</style></head><body>
<header>
<h1>Validation pictures and the training pictures most similar to them</h1>
<p>Mark pairs as the same picture or different ones, and choose the threshold by eye, so low that none is missed.</p>
<div id="bars" title="how many validation pictures have which cosine, from the least to the most similar"></div>
<input id="slider" type="range" step="any" aria-label="threshold">
<p><label>threshold <input id="number" type="number" step="any"></label>
<button id="safe">none of the marked missed</button> <button id="save">save overlap.json</button></p>
<p><b id="above"></b> <span id="marked"></span></p>
</header>
<main id="pairs"></main>
<script type="application/json" id="content">@CONTENT@</script>
<script>
"use strict";
function share(content, threshold) {
  return content.rows.filter((row, place) => content.similarity[place] >= threshold);
}
function judge(content, marks, threshold) {
  const figures = {same: 0, different: 0, missed: 0, falseAlarms: 0};
  for (const pair of content.pairs) {
    const mark = marks[pair.row], above = pair.similarity >= threshold;
    if (mark === "same") { figures.same++; if (!above) figures.missed++; }
    if (mark === "different") { figures.different++; if (above) figures.falseAlarms++; }
  }
  return figures;
}
function safeThreshold(content, marks) {
  const same = content.pairs.filter(pair => marks[pair.row] === "same").map(pair => pair.similarity);
  return same.length ? Math.min(...same) : null;
}
function choice(content, marks, threshold) {
  return {...content.about, threshold: threshold, rows: share(content, threshold), marks: marks};
}
function keyOf(content) { // marks are of pairs: other training pictures, or another way to search them, make other pairs
  return "overlap " + JSON.stringify(content.about);
}
function show(content) {
  const find = name => document.getElementById(name);
  const key = keyOf(content);
  let marks = {}, threshold = content.threshold;
  try { marks = JSON.parse(localStorage.getItem(key)) || {}; } catch (error) { /* a browser that keeps nothing */ }
  let least = Math.min(1, threshold), most = Math.max(-1, threshold);
  for (const value of content.similarity) { least = Math.min(least, value); most = Math.max(most, value); }
  const slider = find("slider"), number = find("number"), bins = 60, counts = new Array(bins).fill(0);
  slider.min = least; slider.max = most + 0.0001;
  for (const value of content.similarity)
    counts[Math.min(bins - 1, Math.floor(bins * (value - least) / (most - least + 1e-9)))]++;
  const tallest = Math.max(1, ...counts);
  const bars = counts.map(count => {
    const bar = document.createElement("i");
    bar.style.height = (count ? Math.max(3, 100 * count / tallest) : 0) + "%";
    find("bars").append(bar);
    return bar;
  });
  const boxes = content.pairs.map(pair => {
    const box = document.createElement("section");
    const cosine = document.createElement("span");
    cosine.className = "cosine";
    cosine.textContent = pair.similarity.toFixed(4);
    box.append(cosine);
    ["validation", "training"].forEach((what, side) => {
      const figure = document.createElement("figure"), image = document.createElement("img");
      const caption = document.createElement("figcaption");
      image.src = pair.pictures[side];
      image.alt = what + " picture";
      const row = side ? pair.nearest : pair.row;
      caption.textContent = what + " row " + row + " (" + pair.names[side] + "): " + pair.captions[side];
      figure.append(image, caption);
      box.append(figure);
    });
    const buttons = ["same", "different"].map(mark => {
      const button = document.createElement("button");
      button.textContent = mark;
      button.onclick = () => {
        if (marks[pair.row] === mark) delete marks[pair.row]; else marks[pair.row] = mark;
        try { localStorage.setItem(key, JSON.stringify(marks)); } catch (error) { /* as above */ }
        update();
      };
      box.append(button);
      return button;
    });
    find("pairs").append(box);
    return {box, buttons};
  });
  function update() {
    slider.value = threshold;
    if (document.activeElement !== number) number.value = threshold.toFixed(6);
    const above = share(content, threshold).length, all = content.rows.length, figures = judge(content, marks, threshold);
    find("above").textContent = above + " of " + all + " validation pictures (" + (100 * above / Math.max(1, all)).toFixed(1) +
      " %) are at or above the threshold.";
    find("marked").textContent = "Of " + figures.same + " marked the same, " + figures.missed +
      " are missed (false negatives); of " + figures.different + " marked different, " + figures.falseAlarms +
      " are taken out (false positives).";
    bars.forEach((bar, bin) => { bar.className = least + (bin + 1) * (most - least) / bins > threshold ? "above" : ""; });
    boxes.forEach(({box, buttons}, place) => {
      const pair = content.pairs[place], isAbove = pair.similarity >= threshold, mark = marks[pair.row];
      const wrong = (mark === "same" && !isAbove) || (mark === "different" && isAbove);
      box.className = "pair" + (isAbove ? "" : " below") + (wrong ? " wrong" : "");
      buttons.forEach(button => button.setAttribute("aria-pressed", button.textContent === mark));
    });
  }
  function move(value) { if (Number.isFinite(value)) { threshold = Math.round(value * 1e6) / 1e6; update(); } }
  slider.oninput = () => move(Number(slider.value));
  number.oninput = () => move(number.value === "" ? NaN : Number(number.value));
  find("safe").onclick = () => { const value = safeThreshold(content, marks); if (value !== null) move(value); };
  find("save").onclick = () => {
    const text = JSON.stringify(choice(content, marks, threshold), null, 2) + "\\n", link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "overlap.json";
    link.click();
  };
  update();
}
if (typeof document !== "undefined") show(JSON.parse(document.getElementById("content").textContent));
</script>
</body></html>
"""
