// What was used: sums of /v1/usage, for a time and by a group that are chosen.

import { get, segment, send } from "./api.js";
import { button, h, text } from "./dom.js";
import * as f from "./format.js";
import { say } from "./toast.js";

const PERIODS = [[0, "Today"], [6, "7 days"], [29, "30 days"], [364, "A year"]];
const GROUPS = { model: "Model", day: "Day", key: "Key" };
const SUMS = { requests: "Requests", prompt_tokens: "Prompt tokens", cached_tokens: "of them cached", completion_tokens: "Generated tokens" };
const MOST = 200;

// tenant: only this one's, for the administrator. failed(error): what the server said instead.
export function usagePart({ purpose, tenant = null, failed }) {
  const choice = (label, options) => h("select", { "aria-label": label, on: { change: () => node.refresh().catch(failed) } },
    options.map(([value, words]) => h("option", { value }, words)));
  const period = choice("Time", PERIODS);
  period.value = 29;
  const group = choice("By", Object.entries(GROUPS).map(([value, words]) => [value, `By ${words.toLowerCase()}`]));
  const first = h("th", { role: "columnheader", scope: "col" });
  const heads = Object.values(SUMS).map((label) => h("th", { role: "columnheader", scope: "col", class: "number" }, label));
  const rows = h("tbody", { role: "rowgroup" });
  const note = h("p", { class: "hint", role: "status" });
  const table = h("table", { role: "table", class: "cards" }, h("caption", { class: "unseen" }, "Usage"),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, first, heads)), rows);
  const box = h("div", { class: "box-line", hidden: true }, table);
  const node = h("div", { class: "part" },
    h("div", { class: "part-head" }, h("h3", {}, "Usage"),
      h("div", { class: "row-actions" }, period, group,
        button("CSV", () => download().catch(failed)))),
    box, note);

  const address = () => {
    const only = tenant === null ? "" : `&tenant=${segment(tenant)}`;
    return `v1/usage?group_by=${group.value}&first_day=${f.daysAgo(period.value)}${only}`;
  };

  node.refresh = async () => {
    const { data } = await get(address(), { purpose });
    const by = group.value;
    const sorted = by === "day" ? data.toReversed() : data.toSorted((one, other) => other.completion_tokens - one.completion_tokens);
    text(first, GROUPS[by]);
    box.hidden = !data.length;
    rows.replaceChildren(...sorted.slice(0, MOST).map((row) => line(row, by)));
    const total = (name) => data.reduce((sum, row) => sum + row[name], 0);
    const more = data.length > MOST ? ` The ${MOST} largest of ${f.count(data.length)} are shown; the CSV has all.` : "";
    text(note, data.length
      ? `${f.several(total("requests"), "request")}, ${f.count(total("prompt_tokens") + total("completion_tokens"))} tokens in all.${more}`
      : "No request has ended in this time.");
  };

  async function download() {
    const csv = await (await send("GET", `${address()}&format=csv`, { purpose })).blob();
    const link = h("a", { href: URL.createObjectURL(csv), download: "usage.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say("usage.csv is downloaded.");
  }
  return node;
}

function line(row, by) {
  return h("tr", { role: "row" },
    h("td", { role: "cell", class: "break" }, row[by]),
    Object.entries(SUMS).map(([name, label]) => h("td", { role: "cell", class: "number", "data-label": label }, f.count(row[name]))));
}
