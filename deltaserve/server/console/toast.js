// Short news, also for screen readers; they leave by themselves.

import { h } from "./dom.js";

const SHOWN_MS = 7000;

export function say(message, kind = "ok") {
  const toast = h("p", { class: `toast ${kind}` }, message);
  document.getElementById("toasts").append(toast);
  setTimeout(() => toast.remove(), SHOWN_MS);
}
