// Charts: uPlot over columns that a page or its event stream delivers. Colours come from the style sheet.
"use strict";

const charts = new Map();
// The legend comes below and may take several lines on a phone.
const heightOf = (box) => (box.classList.contains("tall") ? 308 : 218);
const tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function bytesText(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let size = value, unit = 0;
  while (Math.abs(size) >= 999.5 && unit < units.length - 1) { size /= 1000; unit += 1; }
  return `${unit === 0 || size >= 99.95 ? size.toFixed(0) : size >= 9.995 ? size.toFixed(1) : size.toFixed(2)} ${units[unit]}`;
}

const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));

// Series of each kind of chart: key, name, colour, dash; markers and dashes tell them apart without colour.
const KINDS = {
  loss: { value: number, series: [["loss", "training", "--tone-1", [6, 4]], ["eval_loss", "evaluation", "--tone-0", []]] },
  bytes: { value: bytesText, zero: true, series: [["bytes_up", "up", "--tone-0", []], ["bytes_down", "down", "--tone-1", [6, 4]]] },
  epsilon: { value: number, zero: true, series: [["epsilon", "ε", "--tone-3", []]] },
};

function columns(kind, data) {
  if (kind === "groups") return groupColumns(data);
  const spec = KINDS[kind];
  return {
    data: [data.round || data.x, ...spec.series.map(([key]) => data[key])],
    series: spec.series.map(([, name, colour, dash]) => ({ label: name, stroke: tone(colour), dash, width: 2, value: (_, v) => spec.value(v), points: { show: true, size: 6 } })),
    bands: [], value: spec.value, zero: spec.zero, rollbacks: data.rollbacks || [],
  };
}

function groupColumns(groups) {
  const rounds = [...new Set(groups.flatMap((group) => group.round))].sort((a, b) => a - b);
  const data = [rounds], series = [], bands = [];
  const at = (group, key) => rounds.map((r) => { const i = group.round.indexOf(r); return i < 0 ? null : group[key][i]; });
  groups.forEach((group, index) => {
    const stroke = tone(`--tone-${index % 6}`);
    const dash = [[], [6, 4], [2, 4], [9, 4, 2, 4]][Math.floor(index / 6) % 4] || [];
    data.push(at(group, "mean"));
    series.push({ label: `${group.group} (${Math.max(...group.count)})`, stroke, dash, width: 2, value: (_, v) => number(v), points: { show: true, size: 6 } });
    if (group.high.some((v) => v !== null)) {
      data.push(at(group, "high"), at(group, "low"));
      const edge = { class: "edge", stroke: "transparent", width: 0, points: { show: false }, value: (_, v) => number(v) };
      series.push({ ...edge, label: "high" }, { ...edge, label: "low" });
      bands.push({ series: [data.length - 2, data.length - 1], fill: `color-mix(in srgb, ${stroke} 16%, transparent)` });
    }
  });
  return { data, series, bands, value: number, rollbacks: groups.flatMap((group) => group.rollbacks) };
}

// A roll-back: [round, the round whose model it started from, the run's name where there are several].
const backWords = ([, to, name]) => `${name ? `${name} ` : ""}back to ${to ? `round ${to}` : "the base model"}`;

function drawRollbacks(chart, rollbacks) {
  const { ctx, bbox } = chart, ratio = devicePixelRatio;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = tone("--bad");
  ctx.lineWidth = 1.5 * ratio;
  ctx.setLineDash([3 * ratio, 3 * ratio]);
  ctx.font = `${12 * ratio}px ${getComputedStyle(document.body).fontFamily}`;
  ctx.textBaseline = "top";
  rollbacks.forEach((back, index) => {
    const x = Math.round(chart.valToPos(back[0] - 0.5, "x", true));
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    // The words stand on the side that has room, those of several under each other.
    const onLeft = x - bbox.left > bbox.width / 2;
    ctx.textAlign = onLeft ? "right" : "left";
    ctx.fillText(backWords(back), x + (onLeft ? -5 : 5) * ratio, bbox.top + (2 + 15 * (index % 4)) * ratio);
  });
  ctx.restore();
}

function sayRollbacks(box, rollbacks) {
  box.dataset.label ??= box.getAttribute("aria-label");
  box.setAttribute("aria-label", [box.dataset.label, ...rollbacks.map((back) => `before round ${back[0]}: ${backWords(back)}`)].join("; "));
}

function draw(box, data) {
  const kind = box.dataset.chart;
  const spec = columns(kind, data);
  const held = charts.get(box);
  if (held) held.destroy();
  box.replaceChildren();
  sayRollbacks(box, spec.rollbacks);
  if (!spec.data[0].length) {
    box.append(Object.assign(document.createElement("p"), { className: "none", textContent: "Nothing to draw before the first round is committed." }));
    charts.delete(box);
    return;
  }
  const axis = { stroke: tone("--soft"), grid: { stroke: tone("--rule"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  charts.set(box, new uPlot({
    width: box.clientWidth, height: heightOf(box),
    scales: {
      x: { time: false, range: (_, low, high) => [low - 0.25, high + 0.25] },
      y: { range: (_, low, high) => { const room = (high - low || Math.abs(high) || 1) * 0.12; return [spec.zero ? 0 : low - room, high + room * (spec.rollbacks.length ? 2.5 : 1)]; } },
    },
    axes: [{ ...axis, size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] },
      { ...axis, size: 64, values: (_, ticks) => ticks.map(kind === "bytes" ? bytesText : (v) => +v.toPrecision(6)) }],
    series: [{ label: "round", value: (_, v) => v ?? "–" }, ...spec.series],
    bands: spec.bands,
    hooks: { draw: [(chart) => drawRollbacks(chart, spec.rollbacks)] },
    cursor: { drag: { x: false, y: false } },
  }, spec.data, box));
}

function drawAll(data) {
  for (const box of document.querySelectorAll(".chart[data-chart]")) {
    if (data && box.id) box.dataset.columns = JSON.stringify(data);
    draw(box, JSON.parse(box.dataset.columns));
  }
}

document.addEventListener("DOMContentLoaded", () => {
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  let waiting = 0;
  new ResizeObserver(() => { clearTimeout(waiting); waiting = setTimeout(() => {
    for (const [box, chart] of charts) if (chart.width !== box.clientWidth) chart.setSize({ width: box.clientWidth, height: heightOf(box) });
  }, 60); }).observe(document.body);
});
