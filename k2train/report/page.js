"use strict";
// Values under the pointer, for each chart of curves.
const box = Object.fromEntries(Object.entries(document.body.dataset).map(([key, text]) => [key, Number(text)]));
const unit = document.body.dataset.x;

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}

for (const figure of document.querySelectorAll("figure:has(script)")) {
  const { first, last, series, labels } = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), output = figure.querySelector("output");

  const told = (x) => labels ? labels[x] : x.toLocaleString("en");

  function show(event) {
    const bounds = svg.getBoundingClientRect();
    const across = (event.clientX - bounds.left) / bounds.width * box.width;
    const wanted = first + (across - box.left) / (box.right - box.left) * (last - first);
    const found = series.map(({ x, y }) => ({ x: x[nearest(x, wanted)], y: y[nearest(x, wanted)] }));
    const at = found.reduce((a, b) => Math.abs(b.x - wanted) < Math.abs(a.x - wanted) ? b : a).x;
    const place = box.left + (at - first) / (last - first) * (box.right - box.left);
    cursor.setAttribute("d", `M${place} ${box.top}V${box.bottom}`);
    const values = found.map(({ x, y }, k) =>
      `${series.length > 1 ? series[k].name + " " : ""}${y ?? "-"}${x === at ? "" : ` (at ${told(x)})`}`);
    output.textContent = `${unit} ${told(at)}: ${values.join(", ")}`;
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { cursor.removeAttribute("d"); output.textContent = ""; });
}
