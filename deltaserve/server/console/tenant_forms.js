// Makes and changes tenants and keys. A new key is shown once: it is nowhere else.

import { change, segment, words } from "./api.js";
import { button, check, field, h, text } from "./dom.js";
import * as dialog from "./dialog.js";
import { limitFields, modelsField, readLimits, readModels, readNumber } from "./limits.js";
import { say } from "./toast.js";

const TEXT = { autocomplete: "off", spellcheck: "false", autocapitalize: "none" };
const input = (more) => h("input", { ...TEXT, ...more });

// tenant: the one that is changed; a new one without.
export function openTenantForm(actions, tenant = null) {
  const id = field({ label: "Name", control: input({ maxlength: 64, "data-first": true }), hint: "Letters, digits, dots, dashes." });
  const fields = {
    ...(tenant ? {} : { id }),
    models: modelsField(tenant),
    ...limitFields(tenant ?? {}),
    weight: field({ label: "Weight", control: input({ inputmode: "decimal", value: tenant?.weight ?? 1 }), hint: "Share of a busy engine." }),
    priority: field({ label: "Priority", control: input({ inputmode: "numeric", value: tenant?.priority ?? "", placeholder: "0" }), hint: "Lower runs first." }),
  };
  const { id: first, models, ...numbers } = fields;
  const withKey = h("input", { type: "checkbox", checked: true });
  const content = [first, models, h("div", { class: "columns" }, Object.values(numbers)), tenant ? null : check("Create a key for it as well", withKey)];
  const node = dialog.form({ content, action: tenant ? "Save" : "Create", fields, run, cancel: () => opened.close() });
  const opened = dialog.open(tenant ? `Change ${tenant.id}` : "Create a tenant", node);

  async function run() {
    const values = { models: readModels(models), ...readLimits(fields), weight: readNumber(fields.weight, 1), priority: readNumber(fields.priority) };
    if (tenant) {
      await change("PATCH", `v1/tenants/${segment(tenant.id)}`, values);
      say(`${tenant.id} is changed.`);
    } else {
      const name = first.control.value.trim();
      if (!name) {
        first.complain("Give it a name.");
        return first.control.focus();
      }
      await change("POST", "v1/tenants", { id: name, ...values });
      say(`${name} is created.`);
      if (withKey.checked) firstKey(name, actions);
    }
    await actions.reload();
    opened.close();
  }
}

// The tenant is there already, so what fails here is no failure of its form.
async function firstKey(tenant, actions) {
  try {
    showKey(await change("POST", `v1/tenants/${segment(tenant)}/keys`, {}), `The key of ${tenant}`);
    await actions.reload();
  } catch (error) {
    say(`${tenant} has no key yet. ${words(error)}`, "bad");
  }
}

export function openKeyForm(tenant, actions) {
  const fields = {
    key_alias: field({ label: "What it is for (optional)", control: input({ maxlength: 128, "data-first": true }) }),
    duration: field({ label: "Valid for", control: input({ placeholder: "for ever" }), hint: "A number and a unit: 12h or 90d." }),
    models: modelsField(),
    ...limitFields(),
  };
  const { key_alias: alias, duration, models, ...limits } = fields;
  const content = [
    alias, duration, models,
    h("p", { class: "hint" }, "Limits of the key itself, below those of the tenant:"),
    h("div", { class: "columns" }, Object.values(limits)),
  ];
  const node = dialog.form({ content, action: "Create the key", fields, run, cancel: () => opened.close() });
  const opened = dialog.open(`A key for ${tenant}`, node);

  async function run() {
    const [name, time] = [alias.control.value.trim(), duration.control.value.trim()];
    const body = { models: readModels(models), ...readLimits(fields), ...(name && { key_alias: name }), ...(time && { duration: time }) };
    const key = await change("POST", `v1/tenants/${segment(tenant)}/keys`, body);
    opened.close();
    showKey(key, `A key for ${tenant}`);
    await actions.reload();
  }
}

export function openRotation(id, actions) {
  const overlap = h("select", {}, [["24h", "for 24 hours"], ["1h", "for an hour"], ["7d", "for 7 days"], ["0s", "no longer: it ends at once"]]
    .map(([value, label]) => h("option", { value }, label)));
  const content = [
    h("p", {}, "A new key with the same settings is made."),
    field({ label: "The old key still works", control: overlap }),
  ];
  const node = dialog.form({ content, action: "Rotate", run, cancel: () => opened.close() });
  const opened = dialog.open(`Rotate ${id}`, node);

  async function run() {
    const key = await change("POST", `v1/keys/${segment(id)}/rotate?overlap=${overlap.value}`);
    opened.close();
    showKey(key, "The new key");
    await actions.reload();
  }
}

function showKey({ key }, title) {
  const shown = h("output", {}, key);
  const copy = button("Copy", copyKey, "primary", { "data-first": true });
  const close = button("Done", () => opened.close());
  const opened = dialog.open(title, h("div", { class: "secret" },
    h("p", {}, "Copy it now: it is shown this once. The server keeps its digest only."),
    shown, h("div", { class: "dialog-actions" }, copy, close)));
  opened.closed.then(() => text(shown, ""));

  async function copyKey() {
    try {
      await navigator.clipboard.writeText(key);
      text(copy, "Copied");
    } catch {
      getSelection().selectAllChildren(shown); // the browser gives the clipboard to https only
      text(copy, "Selected: press Ctrl+C");
    }
  }
}
