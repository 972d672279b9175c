// For the administrator: all tenants, their usage and limits. For a tenant: its own.

import { get, words } from "./api.js";
import { meter } from "./chart.js";
import { button, chip, h, keyed, text } from "./dom.js";
import * as f from "./format.js";
import { refreshTenant } from "./keys.js";
import { fillMeter, limitMeters, tightest } from "./limits.js";
import { access, session } from "./session.js";
import { openTenant } from "./tenant_details.js";
import { openTenantForm } from "./tenant_forms.js";
import { say } from "./toast.js";
import { usagePart } from "./usage.js";

const PAGE = 50;
const DAYS = 30;

let shown = [];
let actions = {};
let view = {};

export const tenants = {
  id: "tenants",
  title: () => (access().manage ? "Tenants" : "Usage"),
  seconds: 5,
  allowed: (may) => may.usage,
  build,
  refresh,
};

const failed = (error) => say(words(error), "bad");

function build(given) {
  actions = given;
  return access().manage ? buildAll() : buildOwn();
}

function refresh() {
  return access().manage ? refreshAll() : refreshOwn();
}

// -- the administrator's ----------------------------------------------------------------------

const COLUMNS = [
  { label: "Tenant" },
  { label: "Models" },
  { label: `Requests, ${DAYS} days`, number: true },
  { label: `Tokens, ${DAYS} days`, number: true },
  { label: "Tightest limit", limits: true },
  { label: "Keys", number: true },
];

function buildAll() {
  const filter = h("input", { type: "search", placeholder: "Find a tenant", "aria-label": "Find a tenant", on: { input: draw } });
  const create = button("Create a tenant", () => openTenantForm(actions), "primary", { "aria-haspopup": "dialog" });
  const rows = h("tbody", { role: "rowgroup" });
  const heads = COLUMNS.map(({ label, number }) => h("th", { role: "columnheader", scope: "col", class: number ? "number" : null }, label));
  const table = h("table", { role: "table", class: "cards" }, h("caption", { class: "unseen" }, "Tenants"),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads)), rows);
  const box = h("div", { class: "card flush", hidden: true }, table);
  const note = h("p", { class: "hint", role: "status" }, "Loading …");
  const more = button("", showMore, "", { hidden: true });
  const empty = h("div", { class: "empty card", hidden: true }, h("h3", {}, "No tenants yet"),
    h("p", {}, "A tenant is a customer: with keys, the models that they open, and limits. Without one nobody can use the models."));
  view = { filter, rows, table, box, note, more, empty, limit: PAGE };
  return [
    h("div", { class: "view-head" }, h("h2", { tabindex: "-1" }, "Tenants"), h("div", { class: "tools" }, filter, create)),
    box, note, more, empty,
  ];
}

function showMore() {
  view.limit += PAGE;
  draw();
}

async function refreshAll() {
  const [listed, keys, usage] = await Promise.all([
    get("v1/tenants", { purpose: "manage" }),
    get("v1/keys", { purpose: "manage" }),
    get(`v1/usage?group_by=tenant&first_day=${f.daysAgo(DAYS - 1)}`, { purpose: "manage" }),
  ]);
  const used = new Map(usage.data.map((row) => [row.tenant, row]));
  const now = Date.now() / 1000;
  shown = listed.data.map((tenant) => {
    const sums = used.get(tenant.id);
    const own = keys.data.filter((key) => key.tenant === tenant.id);
    return {
      ...tenant, keys: own,
      open: own.filter(({ expires, blocked }) => !blocked && (expires === null || expires > now)).length,
      requests: sums?.requests ?? 0,
      tokens: (sums?.prompt_tokens ?? 0) + (sums?.completion_tokens ?? 0),
    };
  });
  draw();
  view.table.dispatchEvent(new Event("refreshed"));
}

export const find = (id) => shown.find((tenant) => tenant.id === id);
export const refreshed = (listener, signal) => view.table.addEventListener("refreshed", listener, { signal });

function draw() {
  const wanted = view.filter.value.trim().toLowerCase();
  const found = shown.filter(({ id }) => id.toLowerCase().includes(wanted));
  keyed(view.rows, found.slice(0, view.limit), ({ id }) => id, row);
  view.empty.hidden = shown.length > 0;
  view.box.hidden = !found.length;
  const rest = found.length - view.limit;
  view.more.hidden = rest <= 0;
  text(view.more, `Show ${Math.min(rest, PAGE)} more of ${f.count(rest)}`);
  text(view.note, !shown.length ? "" : found.length ? `${f.several(shown.length, "tenant")}.` : "No tenant matches: change the filter.");
}

function row({ id }) {
  const name = h("button", { type: "button", class: "link name", "aria-haspopup": "dialog", on: { click: () => openTenant(id, actions) } }, id);
  const tags = h("span", { class: "tags" });
  const cells = COLUMNS.map(({ label, number, limits }) =>
    h("td", { role: "cell", "data-label": label, class: number ? "number" : limits ? "limits wide" : null }));
  const bar = meter("");
  const none = h("span", { class: "hint" }, "No limits");
  cells[0].append(name, tags);
  cells[4].append(bar, none);
  const node = h("tr", { role: "row" }, cells);
  node.update = (now) => {
    const closest = tightest(now);
    tags.replaceChildren(...[now.source === "file" ? chip("", "from the file") : null, now.blocked ? chip("bad", "blocked") : null].filter(Boolean));
    text(cells[1], now.models.join(", "));
    text(cells[2], f.count(now.requests));
    text(cells[3], f.compact(now.tokens));
    [bar.hidden, none.hidden] = [!closest, Boolean(closest)];
    if (closest) {
      text(bar.querySelector(".meter-name"), closest.used);
      fillMeter(bar, now, closest);
    }
    text(cells[5], now.open);
  };
  return node;
}

// -- a tenant's own ---------------------------------------------------------------------------

function buildOwn() {
  const meters = { tenant: limitMeters(), key: limitMeters() };
  const allowed = h("p", { class: "hint break" });
  view = { meters, allowed, usage: usagePart({ purpose: "generate", failed }) };
  return [
    h("h2", { tabindex: "-1" }, `Usage of ${session.tenant.tenant.id}`),
    h("div", { class: "card part" }, h("h3", {}, "Limits of the tenant"), meters.tenant, allowed),
    h("div", { class: "card part" }, h("h3", {}, "Limits of this key"), meters.key),
    h("div", { class: "card" }, view.usage),
  ];
}

async function refreshOwn() {
  await Promise.all([refreshTenant(), view.usage.refresh()]);
  const { tenant, ...key } = session.tenant;
  view.meters.tenant.update(tenant);
  view.meters.key.update(key);
  text(view.allowed, `Models: ${tenant.models.join(", ")}${key.models.join() === "*" ? "" : `; this key: ${key.models.join(", ")}`}.`);
}
