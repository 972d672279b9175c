// Publishing a delta: a path, or a version that the registry has.

import { change } from "./api.js";
import { check, field, h } from "./dom.js";
import * as dialog from "./dialog.js";
import { say } from "./toast.js";
import { find } from "./view_models.js";

export function openPublish(actions, name = "") {
  const line = { autocomplete: "off", spellcheck: "false", autocapitalize: "none" };
  const source = h("select", { on: { change: choose } });
  const fields = {
    name: field({ label: "Name", control: h("input", { ...line, value: name, maxlength: 128, "data-first": true, on: { input: offer } }),
      hint: "What requests put into model. The name of a delta that is served gives it a new version." }),
    version: field({ label: "From", control: source }),
    path: field({ label: "Path", control: h("input", { ...line, maxlength: 4096 }),
      hint: "A directory inside one of the server's --delta-root folders, or hf://OWNER/NAME@REVISION." }),
    digest: field({ label: "Digest (optional)", control: h("input", { ...line, maxlength: 100 }),
      hint: "Publish only if it is this one: sha256:…" }),
  };
  const pinned = h("input", { type: "checkbox" });
  const content = [...Object.values(fields), check("Keep it in memory (pinned)", pinned)];
  const node = dialog.form({ content, action: "Publish", fields, run, cancel: () => opened.close() });
  offer();
  const opened = dialog.open("Publish a delta", [
    h("p", {}, "It is checked and loaded beside what is served; requests get it once it is in memory."), node]);

  function typed(key) {
    return fields[key].control.value.trim();
  }

  // The versions that the registry has under this name.
  function offer() {
    const { versions = [], version: current } = find(typed("name")) ?? {};
    const known = versions.filter(({ version }) => version !== current).toReversed();
    source.replaceChildren(h("option", { value: "" }, "A new path"),
      ...known.map(({ version, path }) => h("option", { value: version }, `Version ${version} (${path})`)));
    fields.version.hidden = !known.length;
    choose();
  }

  function choose() {
    fields.path.hidden = fields.digest.hidden = Boolean(source.value);
  }

  async function run() {
    const needed = [["name", "Give it a name."], ...(source.value ? [] : [["path", "Say where it is."]])];
    for (const [key, what] of needed) {
      if (typed(key)) continue;
      fields[key].complain(what);
      return fields[key].control.focus();
    }
    const digest = typed("digest");
    const what = source.value ? { version: Number(source.value) } : { path: typed("path"), ...(digest && { digest }) };
    const delta = await change("POST", "v1/deltas", { name: typed("name"), ...what, ...(pinned.checked && { pinned: true }) });
    say(`${delta.name} is served as version ${delta.version}.`);
    await actions.reload();
    opened.close();
  }
}
