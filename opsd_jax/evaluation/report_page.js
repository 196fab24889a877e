"use strict";
// Draws what report.py embedded. Every text goes in as textContent: samples may hold any markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4"];
const tip = document.getElementById("tip");

const colour = (group) => `var(--c${group % 7})`;
const dash = (group) => DASHES[group % 7];

function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(parent, tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function row(...cells) {
  return html("tr", {}, ...cells.map((cell) => (cell instanceof Node ? cell : html("td", {}, cell))));
}

// ---- numbers

function short(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return trim((value / 1e6).toPrecision(4)) + "M";
  if (size >= 1e4) return trim((value / 1e3).toPrecision(4)) + "k";
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return trim(value.toPrecision(4));
}

const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

function ticks([low, high], count, whole = false) {
  const raw = Math.max((high - low) / count, whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= 0.7 * raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function range(values) {
  // Not Math.min(...values): a hundred runs are more points than a call may have arguments.
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (high > low) return [low, high];
  if (low === 0) return [0, 1];
  const room = Math.abs(low) * 0.1;
  return [low - room, high + room];
}

// ---- charts

function plotted(chart) {
  const xs = [], ys = [];
  for (const series of chart.series) {
    for (const line of series.lines)
      for (const [x, y, error = 0] of line) xs.push(x), ys.push(y - error, y + error);
    if (series.band)
      series.band.forEach(([x, y, sd]) => (xs.push(x), ys.push(y - sd, y + sd)));
  }
  return [range(xs), range(ys)];
}

function draw(chart) {
  const [width, height] = chart.large ? [405, 270] : [296, 180];
  const left = 46, right = 8, top = 8, bottom = 34;
  const [[x0, x1], [y0, y1]] = plotted(chart);
  const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const Y = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
  const path = (points) => points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ");
  const root = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of Object.entries({ width, height, role: "img" })) root.setAttribute(name, value);
  root.setAttribute("aria-label", `${chart.title} against ${chart.x}`);
  for (const t of ticks([y0, y1], chart.large ? 6 : 4)) {
    svg(root, "line", { class: "grid", x1: left, x2: width - right, y1: Y(t), y2: Y(t) });
    svg(root, "text", { x: left - 5, y: Y(t) + 4, "text-anchor": "end" }, short(t));
  }
  for (const t of ticks([x0, x1], chart.large ? 6 : 5, chart.x === "steps"))
    svg(root, "text", { x: X(t), y: height - bottom + 14, "text-anchor": "middle" }, short(t));
  svg(root, "text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, chart.x);
  for (const series of chart.series) drawSeries(root, series, X, Y, path, chart.large);
  const rule = svg(root, "line", { class: "rule", y1: top, y2: height - bottom, visibility: "hidden" });
  root.addEventListener("pointermove", (event) => {
    const at = x0 + ((event.offsetX - left) / (width - left - right)) * (x1 - x0);
    readOff(chart, at, event);
    const x = Math.min(Math.max(event.offsetX, left), width - right);
    for (const name of ["x1", "x2"]) rule.setAttribute(name, x);
    rule.setAttribute("visibility", "visible");
  });
  root.addEventListener("pointerleave", () => {
    rule.setAttribute("visibility", "hidden");
    tip.hidden = true;
  });
  const note = chart.note ? [html("div", { class: "note" }, chart.note)] : [];
  return html("figure", { class: chart.large ? "large" : "small" }, html("figcaption", {}, chart.title), root, ...note);
}

function drawSeries(root, series, X, Y, path, large) {
  const ink = colour(series.group), many = series.lines.length > 1;
  const part = svg(root, "g", { "data-group": series.group });
  if (series.band && many) {
    const up = series.band.map(([x, y, sd]) => [x, y + sd]);
    const down = series.band.map(([x, y, sd]) => [x, y - sd]).reverse();
    svg(part, "polygon", { class: "band", fill: ink, points: path([...up, ...down]) });
  }
  for (const line of series.lines) {
    if (many) svg(part, "polyline", { class: "seed", stroke: ink, points: path(line) });
    else
      for (const [x, y, error] of line)
        if (error)
          svg(part, "line", { class: "error", stroke: ink, x1: X(x), x2: X(x), y1: Y(y - error), y2: Y(y + error) });
  }
  const mean = many ? series.band || [] : series.lines[0];
  // Dashes tell methods apart without colour; on the noisy small charts they would only flicker.
  const dashes = large ? dash(series.group) : "";
  svg(part, "polyline", { class: "mean", stroke: ink, "stroke-dasharray": dashes, points: path(mean) });
  if (mean.length === 1) svg(part, "circle", { cx: X(mean[0][0]), cy: Y(mean[0][1]), r: 3, fill: ink });
}

function readOff(chart, at, event) {
  const table = html("table");
  for (const series of chart.series) {
    if (hidden.has(series.group)) continue;
    const many = series.lines.length > 1;
    const points = many ? series.band || [] : series.lines[0];
    if (!points.length) continue;
    const [x, y, spread] = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const error = spread !== undefined ? ` ± ${short(spread)}${many ? " sd" : " se"}` : "";
    table.append(row(swatch(series.group), DATA.groups[series.group], short(y) + error, `at ${short(x)}`));
  }
  show(event, html("b", {}, chart.title), table);
}

function swatch(group) {
  const cell = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  cell.setAttribute("width", 26);
  cell.setAttribute("height", 10);
  svg(cell, "line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour(group), "stroke-width": 3, "stroke-dasharray": dash(group) });
  return cell;
}

function show(event, ...children) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  const y = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : below;
  tip.style.left = `${Math.max(x, 4)}px`;
  tip.style.top = `${Math.max(y, 4)}px`;
}

const hidden = new Set();

function legend() {
  const bar = document.getElementById("legend");
  DATA.groups.forEach((label, group) => {
    const button = html("button", { "aria-pressed": "true" }, swatch(group), label);
    button.addEventListener("click", () => {
      const off = !hidden.has(group);
      off ? hidden.add(group) : hidden.delete(group);
      button.setAttribute("aria-pressed", String(!off));
      for (const part of document.querySelectorAll(`g[data-group="${group}"]`))
        part.setAttribute("visibility", off ? "hidden" : "visible");
    });
    bar.append(button);
  });
}

// ---- token view

function visible(token) {
  const text = token.text.replace(/\n/g, "⏎\n");
  return text + (token.stop ? "■" : text === "" ? "·" : "");
}

// Quoted text; the id of a token that has none, as a stop token or a part of a character.
const named = (id, text) => (text === "" ? `id ${id}` : JSON.stringify(text));
const chance = (logp) => short(logp === null ? null : Math.exp(logp));

function alternatives(title, found, sampled) {
  const table = html("table", {}, row(html("th", {}, title), html("th", {}, "prob.")));
  for (const [id, text, prob] of found) {
    const name = html("td", { class: "text" }, (id === sampled ? "▸ " : "  ") + named(id, text));
    table.append(row(name, prob === null ? "–" : prob.toFixed(3)));
  }
  return table;
}

function explain(token, unit, event) {
  const facts = [
    `divergence ${short(token.divergence)}${unit}`,
    `probability: student ${chance(token.student_logps)}, teacher ${chance(token.teacher_logps)}`,
    `entropy: student ${short(token.student_entropy)}, teacher ${short(token.teacher_entropy)}`,
  ];
  show(
    event,
    html("b", {}, token.text === "" ? named(token.id, "") : `${JSON.stringify(token.text)} (id ${token.id})`),
    ...facts.map((fact) => html("div", {}, fact)),
    html("table", {}, row(
      html("td", {}, alternatives("teacher", token.teacher_top, token.id)),
      html("td", {}, alternatives("student", token.student_top, token.id)),
    )),
  );
}

function drawTokens(sample, top, unit) {
  const box = html("div", { class: "tokens" });
  for (const token of sample.tokens) {
    const span = html("span", { class: "token" }, visible(token));
    span.style.setProperty("--d", Math.min(1, Math.max(0, token.divergence / top)).toFixed(3));
    span.classList.toggle("differs", token.teacher_top[0][0] !== token.student_top[0][0]);
    span.classList.toggle("bare", token.text === "");
    span.addEventListener("pointerenter", (event) => explain(token, unit, event));
    span.addEventListener("pointerleave", () => (tip.hidden = true));
    box.append(span);
  }
  return box;
}

function drawView(view) {
  const all = view.samples.flatMap((sample) => sample.tokens.map((token) => token.divergence)).sort((a, b) => a - b);
  const top = all[Math.floor(0.98 * (all.length - 1))] || 1;
  const key = html("p", {}, "divergence 0", html("span", { class: "scale" }), `${short(top)}${view.unit} and more (98th percentile)`);
  const details = html("details", {}, html("summary", {}, `${view.label}, step ${view.step}`), key);
  for (const sample of view.samples)
    details.append(html("div", { class: "sample" },
      html("div", { class: "text" }, sample.question),
      drawTokens(sample, top, view.unit),
      html("div", { class: "note" }, `answer ${sample.answer}; graded ${sample.reward ?? "–"}; the teacher was asked:`),
      html("div", { class: "text note" }, sample.teacher_prompt),
      ...(sample.analysis == null ? [] : [
        html("div", { class: "note" }, "and wrote first, up to where it scores:"),
        html("div", { class: "text note" }, sample.analysis)])));
  return details;
}

legend();
for (const chart of DATA.charts) document.getElementById(chart.place).append(draw(chart));
DATA.views.forEach((view, i) => {
  const details = drawView(view);
  details.open = i === 0;
  document.getElementById("views").append(details);
});
