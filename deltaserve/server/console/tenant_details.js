// One tenant: limits and how much of them is used, usage, keys.

import { change, segment, words } from "./api.js";
import { button, chip, h, keyed, showFacts, text } from "./dom.js";
import * as dialog from "./dialog.js";
import * as f from "./format.js";
import { limitMeters } from "./limits.js";
import { openKeyForm, openRotation, openTenantForm } from "./tenant_forms.js";
import { say } from "./toast.js";
import { usagePart } from "./usage.js";
import { find, refreshed } from "./view_tenants.js";

const SHOWN_KEYS = 100;

export function openTenant(id, actions) {
  const gone = new AbortController();
  const facts = h("dl", { class: "facts" });
  const meters = limitMeters();
  const buttons = h("div", { class: "row-actions" });
  const keys = keysPart(id, actions);
  const usage = usagePart({ purpose: "manage", tenant: id, failed });
  const ours = find(id).source === "api";
  const opened = dialog.open(id, [
    facts, h("div", { class: "part" }, h("h3", {}, "Limits"), meters),
    ours ? buttons : h("p", { class: "hint" }, "This tenant comes from the server's tenants file: change it there."),
    keys, usage,
  ], { wide: true });
  opened.closed.then(() => gone.abort());
  refreshed(update, gone.signal);
  if (ours) buttons.append(...makeButtons());
  update();
  usage.refresh().catch(failed);

  function update() {
    const now = find(id);
    if (now === undefined) return opened.close();
    showFacts(facts, factsOf(now));
    meters.update(now);
    keys.update(now);
    if (ours) text(buttons.block, now.blocked ? "Unblock" : "Block …");
  }

  function makeButtons() {
    buttons.block = button("Block …", block);
    return [button("Change …", () => openTenantForm(actions, find(id))), buttons.block, button("Delete …", remove, "danger-quiet")];
  }

  async function setBlocked(blocked) {
    await change("PATCH", `v1/tenants/${segment(id)}`, { blocked });
    await actions.reload();
    say(blocked ? `${id} is blocked.` : `${id} may send requests again.`);
  }

  function block() {
    if (find(id).blocked) return setBlocked(false).catch(failed);
    return dialog.confirm({
      title: `Block ${id}?`, lines: ["Its new requests are refused until you unblock it. Requests that run go on."],
      action: "Block it", danger: true, run: () => setBlocked(true),
    });
  }

  async function remove() {
    const done = await dialog.confirm({
      title: `Delete ${id}?`, lines: ["The tenant and all of its keys are deleted. Its usage is kept."],
      action: "Delete it", danger: true,
      run: async () => {
        await change("DELETE", `v1/tenants/${segment(id)}`);
        await actions.reload();
        say(`${id} is deleted.`);
      },
    });
    if (done) opened.close();
  }
}

const failed = (error) => say(words(error), "bad");

function factsOf(tenant) {
  return [
    ["State", tenant.blocked ? chip("bad", "Blocked") : chip("ok", "Open")],
    ["Models", tenant.models.join(", ")],
    ["Weight", f.short(tenant.weight)],
    ["Priority", tenant.priority ?? f.NONE],
    [`Requests, 30 days`, f.count(tenant.requests)],
    [`Tokens, 30 days`, f.count(tenant.tokens)],
  ];
}

// -- keys -------------------------------------------------------------------------------------

function keysPart(id, actions) {
  const list = h("ul", { class: "version-list" });
  const note = h("p", { class: "hint" });
  const create = button("Create a key …", () => openKeyForm(id, actions), "", { "aria-haspopup": "dialog" });
  const node = h("div", { class: "part" }, h("div", { class: "part-head" }, h("h3", {}, "Keys"), create), list, note);
  node.update = ({ keys }) => {
    const newest = keys.toReversed();
    keyed(list, newest.slice(0, SHOWN_KEYS), (key) => key.id, (key) => keyRow(key, actions));
    const hidden = newest.length - SHOWN_KEYS;
    text(note, hidden > 0 ? `${f.count(hidden)} older keys are not shown.` : newest.length ? "" : "No keys: nobody can send requests for this tenant.");
  };
  return node;
}

function keyRow({ id, source }, actions) {
  const state = h("span", { class: "tags" });
  const name = h("b", { class: "break" });
  const facts = h("p", { class: "hint break" });
  const small = (label, listener) => button(`${label} …`, listener, "small", { "aria-label": `${label} ${id}` });
  const buttons = h("div", { class: "row-actions" }, small("Rotate", () => openRotation(id, actions)), small("Revoke", revoke));
  const node = h("li", {}, h("div", { class: "version-words" }, h("p", {}, name, " ", state), facts), buttons);
  node.update = (key) => {
    const over = key.expires !== null && key.expires <= Date.now() / 1000;
    text(name, key.key_alias ?? id);
    state.replaceChildren(over ? chip("", "Ended") : key.blocked ? chip("bad", "Blocked") : chip("ok", "Open"));
    const limits = key.models.join() === "*" ? "" : ` · models ${key.models.join(", ")}`;
    const made = key.created ? `made ${f.day(key.created)}` : "from the file";
    const until = key.expires === null ? "no end" : over ? `ended ${f.moment(key.expires)}` : `until ${f.moment(key.expires)}`;
    text(facts, `${key.key_alias ? `${id} · ` : ""}${made} · ${until}${limits}`);
    buttons.hidden = over || source === "file";
  };
  return node;

  function revoke() {
    return dialog.confirm({
      title: "Revoke this key?", lines: [`${id} ends at once, for whoever uses it.`], action: "Revoke it", danger: true,
      run: async () => {
        await change("DELETE", `v1/keys/${segment(id)}`);
        await actions.reload();
        say("The key is revoked.");
      },
    });
  }
}
