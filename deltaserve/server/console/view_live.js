// How the server is doing: figures of now, and the last minutes as charts.

import { send } from "./api.js";
import { lineChart, meter } from "./chart.js";
import { h, text } from "./dom.js";
import * as f from "./format.js";
import * as history from "./history.js";
import { session } from "./session.js";

const rate = (value) => `${f.short(value)}/s`;
const CHARTS = [
  {
    title: "Throughput", unit: "tokens per second", show: rate, tick: f.short, least: 4,
    series: [
      { key: "tokensPerSecond", label: "Generated", className: "one" },
      { key: "promptPerSecond", label: "Prompts", className: "two" },
    ],
  },
  {
    title: "Queue", unit: "requests", show: f.short, least: 4,
    series: [
      { key: "running", label: "Running", className: "one" },
      { key: "waiting", label: "Waiting", className: "two" },
    ],
  },
  {
    title: "Time to first token", unit: `of the last ${history.WINDOW_SECONDS} s`, show: f.seconds,
    series: [
      { key: "ttft50", label: "Median", className: "one" },
      { key: "ttft95", label: "95th percentile", className: "two" },
    ],
  },
  {
    title: "Time between tokens", unit: `of the last ${history.WINDOW_SECONDS} s`, show: f.seconds,
    series: [
      { key: "itl50", label: "Median", className: "one" },
      { key: "itl95", label: "95th percentile", className: "two" },
    ],
  },
];
const TIERS = { device: "Deltas on the device", merged: "Merged with the base", host: "Deltas in host memory" };

let tiles, charts, meters, kv;

export const live = {
  id: "live",
  title: () => "Live",
  seconds: 2,
  always: true, // so that the charts have no holes when other views are looked at
  allowed: (may) => may.counters,
  build,
  refresh,
};

function build() {
  history.reset();
  tiles = ["Tokens per second", "Running", "Waiting", "First token, median", "Requests done", "Deltas on the device"].map(tile);
  charts = CHARTS.map((one) => lineChart({ ...one, seconds: history.KEPT_SECONDS }));
  kv = meter("KV cache");
  meters = Object.entries(TIERS).map(([name, label]) => [name, meter(label)]);
  return [
    h("h2", { class: "unseen", tabindex: "-1" }, "Live"),
    h("dl", { class: "tiles" }, tiles),
    h("div", { class: "charts" }, charts),
    h("div", { class: "card memory" }, h("h3", {}, "Memory"), h("div", { class: "meters" }, kv, meters.map(([, node]) => node))),
    h("p", { class: "hint" }, "The charts hold what this page has seen. Prometheus keeps more: configs/prometheus.yml and configs/grafana.json are ready to use."),
  ];
}

function tile(label) {
  const value = h("dd", {}, f.NONE);
  const node = h("div", { class: "tile" }, h("dt", {}, label), value);
  node.show = (said) => text(value, said);
  return node;
}

async function refresh() {
  const source = await (await send("GET", "metrics", { purpose: "manage" })).text();
  show(history.add(source));
}

function show(now) {
  const said = [
    f.short(now.tokensPerSecond), f.count(now.running), f.count(now.waiting), f.seconds(now.ttft50),
    f.compact(now.finished), `${f.count(now.onDevice)} of ${f.count(now.deltas)}`,
  ];
  tiles.forEach((node, index) => node.show(said[index]));
  for (const chart of charts) chart.update(history.points);
  kv.update(now.kv, 1, f.percent(now.kv));
  for (const [name, node] of meters) {
    const { used, limit } = now.tiers.find((tier) => tier.name === name);
    node.hidden = limit === 0 && used === 0;
    node.update(used, limit, limit ? `${f.bytes(used)} of ${f.bytes(limit)}` : f.bytes(used));
  }
}
