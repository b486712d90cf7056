// Values under the pointer, and under the arrow keys. The page says the rest without this.
"use strict";

function format(value, kind) {
  if (kind === "share") return (100 * value).toFixed(2) + "%";
  if (kind === "count") return Math.round(value).toLocaleString("en");
  const size = Math.abs(value);
  if (value !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
}

function nearest(values, x) {
  let low = 0, high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - values[low - 1] < values[low] - x ? low - 1 : low;
}

function tell(area, chart, at) {
  const [first, last] = chart.x, tip = area.querySelector(".tip");
  const rows = chart.lines.map((line) => [line, nearest(line.x, at)]);
  const x = rows.map(([line, i]) => line.x[i]).reduce((a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a));
  const place = (x - first) / (last - first);
  const title = document.createElement("b");
  title.textContent = chart.unit === "step" ? `step ${x.toLocaleString("en")}` : x ? `block ${x}` : "stem";
  if (chart.epoch) title.textContent += `, epoch ${(x / chart.epoch).toFixed(1)}`;
  tip.replaceChildren(title);
  for (const [line, i] of rows) {
    const row = document.createElement("span"), key = document.createElement("i");
    const label = document.createElement("span"), value = document.createElement("b");
    key.style.background = `var(--c${line.color})`;
    label.textContent = line.label + (line.x[i] === x ? "" : ` (${line.x[i].toLocaleString("en")})`);
    value.textContent = format(line.y[i], chart.kind);
    row.append(key, label, value);
    tip.append(row);
  }
  area.querySelector(".cursor").style.left = `${100 * place}%`;
  area.classList.add("told");
  const left = place * area.clientWidth, room = area.clientWidth - tip.offsetWidth;
  const wanted = place < 0.5 ? left + 10 : left - tip.offsetWidth - 10;
  tip.style.left = `${Math.max(-40, Math.min(wanted, room))}px`;
  return x;
}

for (const figure of document.querySelectorAll(".chart")) {
  const chart = JSON.parse(figure.dataset.chart), area = figure.querySelector(".area");
  const [first, last] = chart.x;
  const steps = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  let at = null;
  const hide = () => area.classList.remove("told");
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const place = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    at = tell(area, chart, first + place * (last - first));
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    const i = at === null ? (move > 0 ? -1 : steps.length) : nearest(steps, at);
    at = tell(area, chart, steps[Math.min(steps.length - 1, Math.max(0, i + move))]);
  });
}
