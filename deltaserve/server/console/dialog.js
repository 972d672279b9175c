// Modal dialogs over the browser's own <dialog>: what is behind them is inert, Escape closes them,
// and focus goes back to where it came from.

import { words } from "./api.js";
import { button, h, newId, text } from "./dom.js";

const FOCUSABLE = "button, input, select, textarea, a[href], pre[tabindex], [tabindex='0']";

// Shows `content` under `title`; gives {node, close, closed: Promise}. opener: gets focus back if
// the element that had it is gone by then.
export function open(title, content, { wide = false } = {}) {
  const heading = h("h2", { id: newId("title"), tabindex: "-1" }, title);
  const close = h("button", { type: "button", class: "button quiet close", "aria-label": "Close" }, "✕");
  const node = h(
    "dialog",
    { class: wide ? "dialog wide" : "dialog", "aria-labelledby": heading.id },
    h("div", { class: "dialog-head" }, heading, close),
    h("div", { class: "dialog-body" }, content),
  );
  const before = document.activeElement;
  const closed = new Promise((resolve) => {
    node.addEventListener("close", () => {
      node.remove();
      const home = before?.isConnected ? before : document.querySelector("[role=tabpanel]:not([hidden]) h2");
      home?.focus();
      resolve();
    });
  });
  close.addEventListener("click", () => node.close());
  node.addEventListener("keydown", keepInside);
  document.body.append(node);
  node.showModal();
  (node.querySelector("[data-first]") ?? heading).focus();
  return { node, close: () => node.close(), closed };
}

// Tab goes round inside; the browser alone would leave for its own buttons.
function keepInside(event) {
  if (event.key !== "Tab") return;
  const stops = [...this.querySelectorAll(FOCUSABLE)].filter(
    (node) => !node.disabled && node.tabIndex >= 0 && node.getClientRects().length,
  );
  const [first, last] = [stops[0], stops.at(-1)];
  const at = document.activeElement;
  if (event.shiftKey ? at === first || !stops.includes(at) : at === last) {
    event.preventDefault();
    (event.shiftKey ? last : first).focus();
  }
}

// A form whose submission calls `run()`; while it runs the buttons wait, what it throws is shown,
// at the field that the server names if there is one (`fields`: parameter -> field).
export function form({ content, action, danger = false, fields = {}, run, cancel }) {
  const problem = h("p", { class: "problem box", role: "alert", hidden: true });
  const go = h("button", { type: "submit", class: danger ? "button danger" : "button primary" }, action);
  const back = cancel && button("Cancel", cancel);
  const node = h("form", { novalidate: true, on: { submit } }, content, problem,
    h("div", { class: "dialog-actions" }, back, go));

  async function submit(event) {
    event.preventDefault();
    if (go.getAttribute("aria-disabled") === "true") return;
    clear();
    busy(true);
    try {
      await run();
    } catch (error) {
      complain(error);
    } finally {
      busy(false);
    }
  }

  // Not `disabled`, which would throw the focus away.
  function busy(on) {
    go.setAttribute("aria-disabled", String(on));
    node.setAttribute("aria-busy", String(on));
    text(go, on ? `${action} …` : action);
  }

  function clear() {
    problem.hidden = true;
    for (const one of Object.values(fields)) one.complain(null);
  }

  function complain(error) {
    const place = fields[error.param?.split(".")[0]]; // models.0 belongs to models
    if (place) {
      place.complain(words(error));
      place.control.focus();
    } else {
      text(problem, words(error));
      problem.hidden = false;
    }
  }

  return node;
}

// Asks before `run()`; closes once it is done. Gives whether it was.
export async function confirm({ title, lines, action, danger = false, run }) {
  let done = false;
  const content = lines.map((line) => h("p", {}, line));
  const node = form({
    content, action, danger,
    cancel: () => dialog.close(),
    run: async () => {
      await run();
      done = true;
      dialog.close();
    },
  });
  const dialog = open(title, node);
  await dialog.closed;
  return done;
}
