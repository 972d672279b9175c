// The models: base and deltas, where they are, what they take; from here they are managed.

import { get } from "./api.js";
import { button, chip, command, h, keyed, set, text } from "./dom.js";
import * as f from "./format.js";
import { openDetails } from "./model_details.js";
import { openPublish } from "./publish_form.js";
import { access, session } from "./session.js";

const PAGE = 50;
export const STATES = {
  ready: ["ok", "Ready"],
  registered: ["", "On demand"],
  loading: ["busy", "Loading"],
  draining: ["busy", "Draining"],
  error: ["bad", "Failed"],
  "not served": ["bad", "Not served"],
};
export const TIERS = { device: "Device", host: "Host memory", disk: "Disk" };
const COLUMNS = [
  { label: "Model", sort: (model) => model.name, text: true },
  { label: "State", sort: (model) => model.state, text: true },
  { label: "Tier", sort: (model) => ["device", "host", "disk"].indexOf(model.tier) },
  { label: "In memory", sort: (model) => model.bytes?.resident ?? 0, number: true },
  { label: "Requests", sort: (model) => model.requests ?? 0, number: true },
  { label: "Version", sort: (model) => model.version ?? 0, number: true },
];

let shown = [];
let view = {};
let actions = {};

export const models = {
  id: "models",
  title: () => "Models",
  seconds: 4,
  allowed: (may) => may.see,
  build,
  refresh,
};

function build(given) {
  actions = given;
  const filter = h("input", { type: "search", placeholder: "Find a model", "aria-label": "Find a model", on: { input: draw } });
  const state = h("select", { "aria-label": "State", on: { change: draw } },
    h("option", { value: "" }, "All states"),
    Object.entries(STATES).map(([value, [, label]]) => h("option", { value }, label)));
  const publish = access().manage
    ? button("Publish a delta", () => openPublish(actions), "primary", { "aria-haspopup": "dialog" })
    : null;
  const heads = COLUMNS.map((column, index) => head(column, index));
  const rows = h("tbody", { role: "rowgroup" });
  const more = button("", showMore, "", { hidden: true });
  const note = h("p", { class: "hint", role: "status" }, "Loading …");
  const empty = teach();
  const table = h("table", { role: "table", class: "cards" },
    h("caption", { class: "unseen" }, "Models"),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads)), rows);
  const box = h("div", { class: "card flush", hidden: true }, table);
  view = { filter, state, box, heads, rows, more, note, empty, table, sorted: 0, down: false, limit: PAGE };
  return [
    h("div", { class: "view-head" }, h("h2", { tabindex: "-1" }, "Models"), h("div", { class: "tools" }, filter, state, publish)),
    box, note, more, empty,
  ];
}

function head(column, index) {
  const button = h("button", { type: "button", class: "sort", on: { click: () => sortBy(index) } }, column.label);
  return h("th", { role: "columnheader", scope: "col", class: column.number ? "number" : null }, button);
}

function sortBy(index) {
  view.down = view.sorted === index ? !view.down : Boolean(COLUMNS[index].number);
  view.sorted = index;
  draw();
}

function showMore() {
  view.limit += PAGE;
  draw();
}

async function refresh() {
  const may = access();
  const [listed, deltas, requests] = await Promise.all([
    get("v1/models", { purpose: "see" }),
    may.manage ? get("v1/deltas", { purpose: "manage" }) : { data: [] },
    readRequests(may),
  ]);
  shown = join(listed.data, deltas.data, requests);
  draw();
  view.table.dispatchEvent(new Event("refreshed"));
}

// How many requests each model had: in all with tenants, else since the server started.
async function readRequests(may) {
  if (may.usage) {
    const { data } = await get("v1/usage?group_by=model", { purpose: "see" });
    return new Map(data.map((row) => [row.model, row.requests]));
  }
  const { models: counted } = await get("v1/stats", { purpose: "manage" });
  return new Map(Object.entries(counted).map(([name, usage]) => [name, usage.requests]));
}

// What is served, and what is registered but could not be.
function join(listed, deltas, requests) {
  const registered = new Map(deltas.map((delta) => [delta.name, delta]));
  const served = listed.map((card) => ({ ...card, ...registered.get(card.id), name: card.id, managed: registered.has(card.id) }));
  const names = new Set(served.map(({ name }) => name));
  const lost = deltas.filter(({ name }) => !names.has(name)).map((delta) => ({ ...delta, parent: "", managed: true }));
  return [...served, ...lost].map((model) => ({ ...model, requests: requests.get(model.name) ?? 0 }));
}

export const find = (name) => shown.find((model) => model.name === name);
export const refreshed = (listener, signal) => view.table.addEventListener("refreshed", listener, { signal });

function draw() {
  const wanted = view.filter.value.trim().toLowerCase();
  const found = shown.filter((model) =>
    model.name.toLowerCase().includes(wanted) && (!view.state.value || model.state === view.state.value));
  const by = COLUMNS[view.sorted].sort;
  found.sort((one, other) =>
    isBase(other) - isBase(one) || compare(by(one), by(other)) * (view.down ? -1 : 1) || compare(one.name, other.name));
  view.heads.forEach((node, index) =>
    set(node, "aria-sort", index === view.sorted ? (view.down ? "descending" : "ascending") : null));
  keyed(view.rows, found.slice(0, view.limit), (model) => model.name, row);
  const deltas = shown.filter(({ parent }) => parent !== null).length;
  text(view.note, wordsFor(found.length, deltas));
  const rest = found.length - view.limit;
  view.more.hidden = rest <= 0;
  text(view.more, `Show ${Math.min(rest, PAGE)} more of ${f.count(rest)}`);
  view.box.hidden = !found.length;
  view.empty.hidden = !shown.length || deltas > 0;
}

const isBase = ({ parent }) => Number(parent === null); // always at the top

const compare = (one, other) =>
  typeof one === "string" ? one.localeCompare(other, "en", { numeric: true }) : one - other;

function wordsFor(found, deltas) {
  if (!shown.length) return "No model is open to this key.";
  if (!found) return "No model matches: change the filter.";
  const requests = access().usage ? "Requests count since the first record of usage." : "Requests count since the server started.";
  const sizes = shown.reduce((total, { parent, bytes }) => total + (parent !== null && bytes ? bytes.resident : 0), 0);
  return `${f.several(deltas, "delta")}${deltas ? `, ${f.bytes(sizes)} when all are in memory` : ""}. ${requests}`;
}

function row(model) {
  const name = h("button", { type: "button", class: "link name", "aria-haspopup": "dialog", on: { click: () => openDetails(find(model.name), actions) } }, model.name);
  const tags = h("span", { class: "tags" });
  const cells = COLUMNS.map(({ label, number }) => h("td", { role: "cell", "data-label": label, class: number ? "number" : null }));
  cells[0].append(name, tags);
  const node = h("tr", { role: "row" }, cells);
  let before = "";
  node.update = (now) => {
    const state = JSON.stringify(now);
    if (state === before) return; // nothing that a reader has selected moves
    before = state;
    const [kind, label] = STATES[now.state] ?? ["", now.state];
    tags.replaceChildren(...[now.parent === null ? chip("", "base") : null, now.pinned && now.parent !== null ? chip("accent", "pinned") : null, now.error ? chip("bad", "last load failed") : null].filter(Boolean));
    cells[1].replaceChildren(chip(kind, label));
    text(cells[2], TIERS[now.tier] ?? now.tier);
    cells[3].replaceChildren(...size(now));
    text(cells[4], f.count(now.requests));
    text(cells[5], now.version ?? f.NONE);
  };
  return node;
}

function size({ bytes, parent }) {
  if (!bytes) return [f.NONE];
  const ratio = bytes.full / bytes.resident;
  const smaller = parent === null || !(ratio > 1.05) ? null : h("small", {}, ` ${f.short(ratio)}× smaller`);
  return [f.bytes(bytes.resident), smaller].filter(Boolean);
}

// What to do where there is no delta yet.
function teach() {
  const compress = "deltaserve compress BASE ./my-fine-tune -o deltas/my-delta";
  const steps = access().manage
    ? [h("p", {}, "Compress a fine-tune of the base into a directory inside one of the server's --delta-root folders, then publish it here, or from a shell:"),
      command(`${compress}\n\ncurl ${new URL("v1/deltas", document.baseURI)} \\\n  -H "authorization: Bearer $DELTASERVE_ADMIN_KEY" \\\n  -H "content-type: application/json" \\\n  -d '{"name": "my-delta", "path": "my-delta"}'`)]
    : session.mode === "tenants"
      ? [h("p", {}, "Nothing but the base is shared with you yet. Whoever runs this server can publish a delta for you.")]
      : [h("p", {}, "Compress a fine-tune of the base, and start the server with it:"),
        command(`${compress}\ndeltaserve serve BASE --delta my-delta=deltas/my-delta`),
        h("p", { class: "hint" }, "With --admin-key and --delta-root, deltas come and go while the server runs, from this page too.")];
  return h("div", { class: "empty card", hidden: true }, h("h3", {}, "No deltas yet"), ...steps);
}
