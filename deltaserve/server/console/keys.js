// The keys: asked for once, checked against the server, kept by session.js.

import { ApiError, get } from "./api.js";
import { button, chip, field, h } from "./dom.js";
import * as dialog from "./dialog.js";
import { day } from "./format.js";
import { access, forget, keep, session } from "./session.js";
import { say } from "./toast.js";

// Learns what the server asks for, and whether the keys that are held still hold.
export async function identify() {
  const { version, keys } = await get("version");
  if (keys === undefined) throw new ApiError(503, { message: "the models are being loaded" });
  session.version = version;
  session.mode = keys;
  for (const slot of Object.keys(session.keys)) {
    try {
      const kind = await whose(session.keys[slot]);
      if (kind !== slot) forget(slot);
    } catch (error) {
      if (!(error instanceof ApiError) || ![401, 403].includes(error.status)) throw error;
      forget(slot);
      say("A key that this page held is no longer taken by the server.", "bad");
    }
  }
}

// "admin" or "user"; raises ApiError 401 for a wrong key.
async function whose(key) {
  if (session.mode === "none") return null; // no key has a use here
  if (session.mode === "one") {
    await get("v1/models", { key });
    return "user";
  }
  const card = await get("v1/key", { key });
  if (card.kind === "admin") return "admin";
  session.tenant = card;
  return "user";
}

export async function refreshTenant() {
  if (access().tenant) session.tenant = await get("v1/key", { purpose: "generate" });
}

export const userName = () => (session.mode === "one" ? "API key" : `Tenant ${session.tenant?.tenant.id ?? ""}`);

// What the button in the header says.
export function summary() {
  const { admin, user } = session.keys;
  const held = [admin ? "Admin" : null, user ? userName() : null].filter(Boolean);
  if (session.mode === "none") return "No keys needed";
  return held.length ? held.join(" + ") : "Enter a key";
}

// Asks for a key. done(): once one was taken and is kept.
function keyForm(done) {
  const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false", "data-first": true, maxlength: 500 });
  const entry = field({ label: "API key", control: input, hint: explanation() });

  async function add() {
    const key = input.value.trim();
    if (!key) {
      entry.complain("Paste a key first.");
      return input.focus();
    }
    try {
      const slot = await whose(key);
      keep(slot, key);
      say(slot === "admin" ? "The admin key is in use." : `${userName()} is in use.`);
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      entry.complain("The server does not know this key. Was it copied whole?");
      input.select();
      return input.focus();
    }
    input.value = "";
    await done();
  }

  return dialog.form({ content: entry, action: "Use this key", run: add });
}

const PROMISE = "Keys stay in this browser tab until you close it or forget them. They are sent to this server only, in the Authorization header.";

// The page of somebody who has no key yet.
export function signIn(changed) {
  return h("div", { class: "card sign-in" },
    h("h2", { tabindex: "-1" }, "Sign in"), keyForm(changed), h("p", { class: "hint" }, PROMISE));
}

// changed(): after each key that came or went.
export function openKeys(changed) {
  const held = h("div", { class: "held" });
  const form = keyForm(async () => {
    await changed();
    opened.close();
  });

  async function drop(slot) {
    forget(slot);
    if (!access().see) opened.close(); // the page asks for one itself
    show();
    await changed();
  }

  function show() {
    const rows = ["admin", "user"].filter((slot) => session.keys[slot]).map((slot) => {
      const name = slot === "admin" ? "Admin key" : userName();
      const remove = button(`Forget ${name}`, () => drop(slot), "small");
      const expires = slot === "user" && session.tenant?.expires;
      const facts = expires ? h("span", { class: "hint" }, `until ${day(expires)}`) : null;
      return h("div", { class: "held-key" }, chip("ok", name), facts, remove);
    });
    held.replaceChildren(...rows);
    form.querySelector("input").focus();
  }

  const opened = dialog.open("Keys", [h("p", {}, PROMISE), held, form]);
  show();
}

function explanation() {
  if (session.mode === "one") return "The key that the server was started with (DELTASERVE_API_KEY).";
  return "The admin key shows and manages everything, but cannot generate. A tenant's key shows the tenant's models and usage, and opens the playground. You can use one of each at once.";
}

export function needsKey(title, what, openDialog) {
  return h("div", { class: "empty card" },
    h("h2", { tabindex: "-1" }, title),
    h("p", {}, what),
    button("Enter a key", openDialog, "primary"));
}
