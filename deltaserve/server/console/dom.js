// Elements from data. Text is only ever set as text: names, outputs and errors are hostile input.

const SVG = "http://www.w3.org/2000/svg";

// h("button", {class: "x", on: {click: f}, "aria-label": "y", hidden: true}, "text", node, null)
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, { on = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) set(node, name, value);
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// An attribute; false, null and undefined take it away. Properties where attributes mislead.
export function set(node, name, value) {
  if (node.localName !== "option" && (name === "value" || name === "checked")) {
    if (node[name] !== value) node[name] = value;
  } else if (value === false || value === null || value === undefined) {
    node.removeAttribute(name);
  } else {
    const wanted = value === true ? "" : String(value);
    if (node.getAttribute(name) !== wanted) node.setAttribute(name, wanted);
  }
}

// Only if it differs: what a reader has selected, or a screen reader reads, stays.
export function text(node, value) {
  const wanted = String(value);
  if (node.textContent !== wanted) node.textContent = wanted;
  return node;
}

// The children of `parent` become one node for each item, in their order. Nodes are kept by key,
// so that focus and what is open survive new data. `make` gives a node with an `update(item)`.
export function keyed(parent, items, key, make) {
  const known = (parent.knownNodes ??= new Map());
  const wanted = new Map(items.map((item) => [String(key(item)), item]));
  for (const [name, node] of known) {
    if (!wanted.has(name)) {
      node.remove();
      known.delete(name);
    }
  }
  let place = parent.firstElementChild;
  for (const [name, item] of wanted) {
    let node = known.get(name);
    if (node === undefined) {
      node = make(item);
      known.set(name, node);
    }
    node.update(item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
}

let ids = 0;
export const newId = (prefix) => `${prefix}-${++ids}`;

// A labelled field: {label, hint, control}. Shows errors beside the control.
export function field({ label, hint, control }) {
  const id = (control.id ||= newId("field"));
  const problem = h("p", { class: "problem", id: `${id}-problem`, hidden: true });
  const note = hint ? h("p", { class: "hint", id: `${id}-hint` }, hint) : null;
  const described = `${note ? note.id : ""} ${problem.id}`.trim();
  set(control, "aria-describedby", described);
  const node = h("div", { class: "field" }, h("label", { for: id }, label), control, note, problem);
  node.control = control;
  node.complain = (message) => {
    text(problem, message ?? "");
    problem.hidden = !message;
    set(control, "aria-invalid", message ? "true" : null);
  };
  return node;
}

export function check(label, control, hint) {
  control.id ||= newId("check");
  const words = h("label", { for: control.id }, label);
  return h("div", { class: "check" }, control, words, hint ? h("p", { class: "hint" }, hint) : null);
}

export function command(lines) {
  const code = h("code", {}, lines);
  const copying = button("Copy", copy, "small");
  function copy() {
    navigator.clipboard?.writeText(lines).then(
      () => text(copying, "Copied"),
      () => text(copying, "Select it to copy"),
    ) ?? text(copying, "Select it to copy");
    setTimeout(() => text(copying, "Copy"), 2000);
  }
  const box = h("pre", { tabindex: "0", role: "region", "aria-label": "Command" }, code);
  return h("div", { class: "command" }, box, copying);
}

// kind: small, primary, danger-quiet, ...
export function button(label, listener, kind = "", attributes = {}) {
  return h("button", { type: "button", class: `button ${kind}`.trim(), ...attributes, on: { click: listener } }, label);
}

// The facts [name, value] of something in a <dl>; [name, value, "whole"] takes all of its width.
export function showFacts(list, facts) {
  list.replaceChildren(...facts.map(([name, value, width]) =>
    h("div", { class: width }, h("dt", {}, name), h("dd", {}, value))));
}

export const chip = (kind, label) => h("span", { class: `chip ${kind}` }, label);
