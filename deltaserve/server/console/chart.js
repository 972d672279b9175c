// A line chart over time: axes with units, a legend, and values under the pointer or, with the
// arrow keys, without one.

import { h, newId, set, svg, text } from "./dom.js";
import { NONE } from "./format.js";

const HEIGHT = 190;
const EDGE = { top: 12, right: 12, bottom: 26, left: 52 };

// series: [{key, label, className}]; show(value): with its unit; tick(value): for the axis.
// least: the axis reaches at least so far, so that noise about zero does not look like a mountain.
export function lineChart({ title, unit, series, show, tick = show, seconds, least = 0 }) {
  let [points, at, width] = [[], null, 600];
  const grid = svg("g", { class: "grid" });
  const lines = svg("g", { class: "lines" });
  const cursor = svg("g", { class: "cursor", visibility: "hidden" });
  const picture = svg("svg", { class: "plot", "aria-hidden": "true", focusable: "false" }, grid, lines, cursor);
  const values = series.map(() => h("b", {}, NONE));
  const when = h("span");
  const legend = h("ul", { class: "legend" },
    series.map(({ label, className }, index) =>
      h("li", {}, h("i", { class: `swatch ${className}`, "aria-hidden": "true" }), `${label} `, values[index])),
    h("li", {}, when)); // only while a value of before is read
  const spoken = h("p", { class: "unseen", "aria-live": "polite" });
  const summary = h("p", { class: "unseen", id: newId("summary") }); // the chart in words
  const empty = h("p", { class: "chart-empty" }, "Nothing yet: it begins with the next request.");
  const heading = h("h3", { id: newId("chart") }, title, " ", h("small", {}, unit));
  const area = h("div", {
    class: "chart-area", tabindex: "0", role: "group", "aria-labelledby": heading.id,
    "aria-describedby": summary.id,
    on: { pointermove, pointerleave: () => move(null), keydown, blur: () => move(null) },
  }, picture, empty);
  const node = h("figure", { class: "card chart" }, h("figcaption", {}, heading, legend), area, summary, spoken);
  new ResizeObserver(([entry]) => {
    const found = Math.round(entry.contentRect.width);
    if (found && found !== width) {
      width = found;
      draw();
    }
  }).observe(area);

  const end = () => points.at(-1)?.time ?? 0;
  // The axis grows with what is known, up to `seconds`.
  const span = () => Math.min(Math.max(end() - (points[0]?.time ?? 0), 60), seconds);
  const x = (time) => EDGE.left + (1 - (end() - time) / span()) * (width - EDGE.left - EDGE.right);
  const has = (point) => series.some(({ key }) => typeof point[key] === "number");

  function top() {
    const largest = Math.max(least, ...points.flatMap((p) => series.map(({ key }) => p[key] ?? 0)));
    return niceTop(largest || 1);
  }

  function draw() {
    const { max, step } = top();
    const y = (value) => EDGE.top + (1 - value / max) * (HEIGHT - EDGE.top - EDGE.bottom);
    set(picture, "viewBox", `0 0 ${width} ${HEIGHT}`);
    grid.replaceChildren(...axis(max, step, y));
    lines.replaceChildren(...series.flatMap(({ key, className }) => path(key, className, y)));
    empty.hidden = points.some(has);
    mark(y);
  }

  function* axis(max, step, y) {
    for (let value = 0; value <= max + step / 2; value += step) {
      yield svg("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) });
      yield svg("text", { x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" }, tick(value));
    }
    const every = span() < 120 ? 30 : width < 420 ? 120 : 60;
    for (let past = 0; past <= span(); past += every) {
      const label = past === 0 ? "now" : past % 60 ? `−${past} s` : `−${past / 60} min`;
      yield svg("text", { x: x(end() - past), y: HEIGHT - 7, "text-anchor": past === 0 ? "end" : "middle" }, label);
    }
  }

  // Broken where there is no value: nothing is invented between. A lone value is a dot.
  function path(key, className, y) {
    const runs = [[]];
    for (const point of points) {
      if (typeof point[key] === "number") runs.at(-1).push(point);
      else if (runs.at(-1).length) runs.push([]);
    }
    return runs.filter((run) => run.length).map((run) => {
      if (run.length === 1) {
        return svg("circle", { class: className, cx: x(run[0].time), cy: y(run[0][key]), r: 2 });
      }
      const places = run.map((p) => `${x(p.time).toFixed(1)},${y(p[key]).toFixed(1)}`);
      return svg("polyline", { class: className, points: places.join(" ") });
    });
  }

  function mark(y) {
    const point = at === null ? points.findLast(has) : points.find(({ time }) => time === at);
    series.forEach(({ key }, index) => text(values[index], point ? show(point[key]) : NONE));
    text(when, at === null || !point ? "" : `${Math.round(end() - point.time)} s ago`);
    set(cursor, "visibility", at === null || !point ? "hidden" : "visible");
    if (at === null || !point) return;
    const place = x(point.time);
    const dots = series.filter(({ key }) => typeof point[key] === "number").map(({ key, className }) =>
      svg("circle", { class: className, cx: place, cy: y(point[key]), r: 4 }));
    cursor.replaceChildren(
      svg("line", { x1: place, x2: place, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }), ...dots);
  }

  function describe() {
    const parts = series.map(({ key, label }) => {
      const known = points.map((point) => point[key]).filter((value) => typeof value === "number");
      if (!known.length) return `${label}: nothing yet`;
      return `${label}: now ${show(known.at(-1))}, from ${show(Math.min(...known))} to ${show(Math.max(...known))}`;
    });
    text(summary, `A chart of the last ${Math.round(span())} seconds. ${parts.join(". ")}. Left and right arrow keys read its values.`);
  }

  function move(time) {
    if (time === at) return;
    at = time;
    draw();
  }

  function pointermove(event) {
    const box = picture.getBoundingClientRect();
    const place = event.clientX - box.left;
    let nearest = null;
    for (const point of points.filter(has)) {
      if (nearest === null || Math.abs(x(point.time) - place) < Math.abs(x(nearest.time) - place)) nearest = point;
    }
    move(nearest?.time ?? null);
  }

  function keydown(event) {
    const known = points.filter(has);
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -known.length, End: known.length };
    if (event.key === "Escape" && at !== null) return move(null);
    if (!(event.key in steps) || !known.length) return;
    event.preventDefault();
    const now = at === null ? known.length : known.findIndex(({ time }) => time === at);
    const next = Math.min(Math.max(now + steps[event.key], 0), known.length - 1);
    move(known[next].time);
    text(spoken, `${when.textContent}: ${series.map(({ key, label }) => `${label} ${show(known[next][key])}`).join(", ")}`);
  }

  node.update = (given) => {
    points = given;
    if (!points.some(({ time }) => time === at)) at = null;
    draw();
    describe();
  };
  return node;
}

// An axis of 3 to 5 round steps that reaches `largest`.
function niceTop(largest) {
  const rough = largest / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  return { step, max: step * Math.ceil(largest / step - 0.001) };
}

// A bar of a part of a whole, with its words beside it.
export function meter(label) {
  const fill = svg("rect", { x: 0, y: 0, width: 0, height: 8, class: "fill" });
  const words = h("span", { class: "meter-words" });
  const name = h("span", { class: "meter-name" }, label);
  const bar = svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", class: "bar", "aria-hidden": "true", focusable: "false" }, fill);
  const node = h("div", { class: "meter" }, name, words, bar);
  node.update = (used, limit, said) => {
    const part = limit > 0 ? Math.min(used / limit, 1) : 0;
    set(fill, "width", 100 * part);
    set(node, "class", `meter${part >= 1 ? " full" : part >= 0.8 ? " high" : ""}`);
    text(words, said);
  };
  return node;
}
