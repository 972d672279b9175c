// One prompt, several models, their answers side by side.

import { get } from "./api.js";
import { answerColumn } from "./answer.js";
import { button, field, h, keyed, newId, text } from "./dom.js";
import * as f from "./format.js";
import { readNumber } from "./limits.js";
import { access } from "./session.js";

// A browser opens six connections to a server that speaks HTTP/1.1; the page itself needs some.
const MOST = 4;
const FIRST = 3; // chosen at the start

let view = {};
let chosen = new Set();
let running = [];

export const playground = {
  id: "playground",
  title: () => "Playground",
  missing: (may) => may.see && "The admin key manages and cannot generate. Add a tenant's key to ask the models; the admin key stays in use.",
  seconds: 10,
  allowed: (may) => may.generate,
  build,
  refresh,
};

function build() {
  for (const column of running) column.stop();
  [chosen, running] = [new Set(), []];
  const list = h("div", { class: "pick-list" });
  const filter = h("input", { type: "search", placeholder: "Find a model", "aria-label": "Find a model to ask", hidden: true, on: { input: draw } });
  const note = h("p", { class: "hint", id: newId("pick"), role: "status" }, "Loading …");
  const pick = h("fieldset", { class: "pick", "aria-describedby": note.id }, h("legend", {}, "Models"), filter, list, note);
  const fields = {
    prompt: field({ label: "Prompt", control: h("textarea", { rows: 4, spellcheck: "false", on: { keydown: shortcut } }) }),
    kind: field({ label: "Ask as", control: h("select", {}, h("option", { value: "chat" }, "Chat"), h("option", { value: "completion" }, "Completion")) }),
    temperature: numberField("Temperature", "0"),
    max: numberField("Max tokens", "128"),
    seed: numberField("Seed", "", "random"),
  };
  const { prompt, ...settings } = fields;
  const go = h("button", { type: "submit", class: "button primary" }, "Ask");
  const stop = button("Stop all", stopAll, "", { hidden: true });
  const state = h("p", { class: "hint", role: "status" }, "Ctrl+Enter asks too.");
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const form = h("form", { class: "card ask", novalidate: true, on: { submit: ask } },
    pick, prompt, h("div", { class: "settings" }, Object.values(settings)), problem, h("div", { class: "runs" }, go, stop, state));
  const answers = h("div", { class: "answers" });
  view = { list, filter, note, fields, go, stop, state, problem, form, answers, models: [], asked: false };
  return [h("h2", { tabindex: "-1" }, "Playground"), form, answers];
}

const numberField = (label, value, placeholder = "") =>
  field({ label, control: h("input", { inputmode: "decimal", autocomplete: "off", value, placeholder }) });

async function refresh() {
  const { data } = await get("v1/models", { purpose: "generate" });
  view.models = data.map(({ id, parent }) => ({ id, base: parent === null }));
  const there = new Set(view.models.map(({ id }) => id));
  chosen = chosen.intersection(there);
  if (!view.asked) view.models.slice(0, FIRST).forEach(({ id }) => chosen.add(id));
  view.asked ||= there.size > 0;
  draw();
}

function draw() {
  view.filter.hidden = view.models.length <= 12;
  const wanted = view.filter.value.trim().toLowerCase();
  const found = view.models.filter(({ id }) => chosen.has(id) || id.toLowerCase().includes(wanted));
  keyed(view.list, found, ({ id }) => id, choice);
  const full = chosen.size >= MOST;
  if (!view.models.length) text(view.note, "No model is open to this key.");
  else text(view.note, full ? `${MOST} models is the most at once.` : `${f.several(chosen.size, "model")} chosen; up to ${MOST} at once.`);
}

function choice({ id, base }) {
  const box = h("input", { type: "checkbox", value: id, on: { change } });
  const node = h("label", {}, box, h("span", {}, id, base ? h("span", { class: "hint" }, " base") : null));
  node.update = () => {
    box.checked = chosen.has(id);
    box.disabled = !box.checked && chosen.size >= MOST;
  };
  return node;

  function change() {
    if (box.checked) chosen.add(id);
    else chosen.delete(id);
    draw();
  }
}

function shortcut(event) {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  view.form.requestSubmit();
}

// -- asking -----------------------------------------------------------------------------------

function complain(message, control) {
  text(view.problem, message ?? "");
  view.problem.hidden = !message;
  control?.focus();
}

async function ask(event) {
  event.preventDefault();
  if (running.length || !access().generate) return;
  const { fields } = view;
  complain(null);
  if (!chosen.size) return complain("Choose a model first.", view.list.querySelector("input"));
  if (!fields.prompt.control.value) return complain("Write a prompt first.", fields.prompt.control);
  const [path, body] = request(fields);
  // In the order of the list, so that the same model stands at the same place.
  const columns = view.models.filter(({ id }) => chosen.has(id)).map(({ id }) => answerColumn(id));
  view.answers.replaceChildren(...columns);
  busy(columns);
  const ends = await Promise.all(columns.map((column) => column.run(path, body)));
  if (running === columns) busy([], ends);
}

// As it was typed: what is wrong with it the server says, in each column.
function request({ prompt, kind, temperature, max, seed }) {
  const common = { temperature: readDecimal(temperature), max_tokens: readNumber(max, undefined), seed: readNumber(seed, undefined) };
  return kind.control.value === "chat"
    ? ["v1/chat/completions", { ...common, messages: [{ role: "user", content: prompt.control.value }] }]
    : ["v1/completions", { ...common, prompt: prompt.control.value }];
}

function readDecimal(one) {
  const typed = one.control.value.trim().replace(",", ".");
  if (typed === "") return undefined;
  return Number.isNaN(Number(typed)) ? typed : Number(typed);
}

function busy(columns, ends = []) {
  const focused = document.activeElement === view.go || document.activeElement === view.stop;
  running = columns;
  view.go.hidden = columns.length > 0;
  view.stop.hidden = columns.length === 0;
  if (focused) (columns.length ? view.stop : view.go).focus();
  const count = (end) => ends.filter((one) => one === end).length;
  const counted = ["done", "stopped", "failed"].filter(count).map((end) => `${count(end)} ${end}`).join(", ");
  text(view.state, columns.length ? `${f.several(columns.length, "model")} answering …` : `${counted}.`);
}

function stopAll() {
  for (const column of running) column.stop();
}
