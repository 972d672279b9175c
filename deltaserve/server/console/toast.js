// Short news, also for screen readers; they leave by themselves.

import { h } from "./dom.js";

const SHOWN_MS = 7000;

export function say(message, kind = "ok") {
  const toast = h("p", { class: `toast ${kind}` }, message);
  const place = document.getElementById("toasts");
  place.append(toast);
  // Shown anew, so that it lies above a dialog that was opened meanwhile.
  place.hidePopover();
  place.showPopover();
  setTimeout(() => toast.remove(), SHOWN_MS);
}
