// Limits of tenants and keys, under the names of the API.

import { meter } from "./chart.js";
import { field, h } from "./dom.js";
import * as f from "./format.js";

export const LIMITS = [
  { name: "rpm_limit", label: "Requests per minute", used: "Requests, last minute" },
  { name: "tpm_limit", label: "Tokens per minute", used: "Tokens, last minute" },
  { name: "max_parallel_requests", label: "Requests at once", used: "Requests at once" },
  { name: "daily_token_budget", label: "Tokens per day (UTC)", used: "Tokens today" },
  { name: "monthly_token_budget", label: "Tokens per month (UTC)", used: "Tokens this month" },
];

// The limit of which the greatest part is used; undefined if there is none.
export function tightest(card) {
  const part = ({ name }) => card.used[name] / card[name];
  return LIMITS.filter(({ name }) => card[name] !== null).toSorted((one, other) => part(other) - part(one))[0];
}

// A bar for each limit that `update(card)` has.
export function limitMeters() {
  const bars = LIMITS.map((limit) => [limit, meter(limit.used)]);
  const none = h("p", { class: "hint" }, "No limits.");
  const node = h("div", { class: "meters" }, none, bars.map(([, bar]) => bar));
  node.update = (card) => {
    none.hidden = Boolean(tightest(card));
    for (const [limit, bar] of bars) {
      bar.hidden = card[limit.name] === null;
      if (!bar.hidden) fillMeter(bar, card, limit);
    }
  };
  return node;
}

export const fillMeter = (bar, card, { name }) =>
  bar.update(card.used[name], card[name], `${f.compact(card.used[name])} of ${f.compact(card[name])}`);

// -- forms ------------------------------------------------------------------------------------

const number = (value, more = {}) => h("input", { inputmode: "numeric", autocomplete: "off", placeholder: "no limit", value: value ?? "", ...more });

export function limitFields(card = {}) {
  return Object.fromEntries(LIMITS.map(({ name, label }) => [name, field({ label, control: number(card[name]) })]));
}

export function modelsField(card) {
  const control = h("input", { autocomplete: "off", spellcheck: "false", autocapitalize: "none", value: (card?.models ?? ["*"]).join(", ") });
  return field({ label: "Models", control, hint: "Names with commas between them; * stands for anything, ? for one character." });
}

export const readModels = (one) => one.control.value.split(",").map((name) => name.trim()).filter(Boolean);

// An empty field is no limit; what is no number is left for the server to refuse, in its own words.
export function readNumber(one, empty = null) {
  const typed = one.control.value.replaceAll(/[\s,_]/g, "");
  if (typed === "") return empty;
  return Number.isNaN(Number(typed)) ? typed : Number(typed);
}

export const readLimits = (fields) => Object.fromEntries(LIMITS.map(({ name }) => [name, readNumber(fields[name])]));
