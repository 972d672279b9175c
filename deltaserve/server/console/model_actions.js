// What is done with a delta: publish, pin, roll back, serve another version, forget one, unload.

import { change, segment, words } from "./api.js";
import { check, chip, command, field, h, keyed, text } from "./dom.js";
import * as dialog from "./dialog.js";
import * as f from "./format.js";
import { access } from "./session.js";
import { say } from "./toast.js";
import { find, refreshed, STATES, TIERS } from "./view_models.js";

const path = (name, end = "") => `v1/deltas/${segment(name)}${end}`;

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

export function openDetails(model, actions) {
  const facts = h("dl", { class: "facts" });
  const buttons = h("div", { class: "row-actions" });
  const versions = h("div", { class: "versions" });
  const problem = h("p", { class: "problem box", role: "alert", hidden: true });
  const manages = access().manage && model.managed;
  const gone = new AbortController();
  const opened = dialog.open(model.name, [problem, facts, buttons, versions, manages ? null : howToCall(model)].filter(Boolean), { wide: true });
  opened.closed.then(() => gone.abort());
  refreshed(update, gone.signal);
  if (manages) buttons.append(...makeButtons());
  update();

  function update() {
    const now = find(model.name);
    if (now === undefined) return opened.close();
    problem.hidden = !now.error;
    text(problem, now.error ? `The last load failed: ${now.error}` : "");
    showFacts(facts, now);
    if (!manages) return;
    showVersions(versions, now, act, actions);
    text(buttons.pin, now.pinned ? "Unpin" : "Pin");
    buttons.back.hidden = !previous(now);
  }

  function makeButtons() {
    const button = (label, listener, kind = "") => h("button", { type: "button", class: `button ${kind}`, on: { click: listener } }, label);
    buttons.pin = button("Pin", pin);
    buttons.back = button("Roll back …", rollBack);
    return [buttons.pin, buttons.back, button("Publish a new version …", renew), button("Unload …", unload, "danger-quiet")];
  }

  // Without a question: it is easily undone.
  async function pin() {
    const wanted = !find(model.name).pinned;
    try {
      await act("PATCH", path(model.name), { pinned: wanted });
      say(wanted ? `${model.name} stays in memory.` : `${model.name} may give way to others.`);
    } catch (error) {
      say(words(error), "bad");
    }
  }

  function rollBack() {
    const now = find(model.name);
    const to = previous(now);
    return dialog.confirm({
      title: `Roll ${model.name} back?`,
      lines: [`Version ${to.version} is loaded again and takes over from version ${now.version}. Requests that run end on the version they began with.`],
      action: `Roll back to version ${to.version}`,
      run: async () => {
        await act("POST", path(model.name, "/rollback"), {});
        say(`${model.name} is served as version ${to.version} again.`);
      },
    });
  }

  function renew() {
    opened.close();
    openPublish(actions, model.name);
  }

  async function unload() {
    const done = await dialog.confirm({
      title: `Unload ${model.name}?`,
      lines: [
        "Its requests may end, its memory is freed, and its name and versions are forgotten. New requests for it get “does not exist”.",
        "The files stay where they are, so it can be published again.",
      ],
      action: "Unload it", danger: true,
      run: async () => {
        await act("DELETE", path(model.name));
        say(`${model.name} is unloaded and its memory is free.`);
      },
    });
    if (done) opened.close();
  }

  async function act(method, where, body) {
    await change(method, where, body);
    await actions.reload();
  }
}

// As the server chooses it: the latest before the current one that was loaded once.
const previous = ({ version, versions = [] }) =>
  versions.findLast((one) => one.version < (version ?? 0) && one.state === "ready");

function showFacts(list, model) {
  const [kind, label] = STATES[model.state] ?? ["", model.state];
  const { bytes } = model;
  const facts = [
    ["State", chip(kind, label)],
    ["Tier", TIERS[model.tier] ?? model.tier],
    ["Requests", f.count(model.requests)],
    ["In memory", bytes ? f.bytes(bytes.resident) : f.NONE],
    ["On disk", bytes ? f.bytes(bytes.disk) : f.NONE],
    ["As a whole model", bytes ? f.bytes(bytes.full) : f.NONE],
    ["Codecs", model.codecs?.length ? model.codecs.join(", ") + (model.merged ? ", merged" : "") : null],
    ["Longest sequence", model.max_model_len ? `${f.count(model.max_model_len)} tokens` : null],
    ["Digest", model.digest ? h("code", { class: "break" }, model.digest) : null],
  ].filter(([, value]) => value !== null);
  list.replaceChildren(...facts.map(([name, value]) =>
    h("div", { class: name === "Digest" ? "whole" : null }, h("dt", {}, name), h("dd", {}, value))));
}

function showVersions(place, model, act) {
  if (!place.list) {
    place.list = h("ul", { class: "version-list" });
    place.append(h("h3", {}, "Versions"), place.list);
  }
  const newest = [...(model.versions ?? [])].reverse();
  keyed(place.list, newest, (one) => one.version, (one) => versionRow(model.name, one, act));
}

function versionRow(name, { version, path: source, digest, created }, act) {
  const state = h("span", { class: "tags" });
  const error = h("p", { class: "problem" });
  const serve = h("button", { type: "button", class: "button small", "aria-label": `Serve version ${version}`, on: { click: activate } }, "Serve");
  const drop = h("button", { type: "button", class: "button small", "aria-label": `Forget version ${version}`, on: { click: forget } }, "Forget");
  const node = h("li", {},
    h("div", { class: "version-words" },
      h("p", {}, h("b", {}, `Version ${version}`), " ", state),
      h("p", { class: "hint break" }, `${source} · ${f.moment(created)}`),
      h("p", { class: "hint break" }, digest), error),
    h("div", { class: "row-actions" }, serve, drop));
  node.update = (now) => {
    const current = find(name)?.version === now.version;
    const [kind, label] = current ? ["ok", "Current"] : now.state === "failed" ? ["bad", "Failed"] : ["", "Kept"];
    state.replaceChildren(chip(kind, label));
    text(error, now.error ?? "");
    error.hidden = !now.error;
    serve.hidden = drop.hidden = current;
  };
  return node;

  function activate() {
    return dialog.confirm({
      title: `Serve version ${version} of ${name}?`,
      lines: ["It is loaded, and takes over once it is in memory. Requests that run end on the version they began with."],
      action: `Serve version ${version}`,
      run: async () => {
        await act("POST", path(name, "/rollback"), { version });
        say(`${name} is served as version ${version}.`);
      },
    });
  }

  function forget() {
    return dialog.confirm({
      title: `Forget version ${version} of ${name}?`,
      lines: ["It can no longer be rolled back to. Its files stay where they are."],
      action: `Forget version ${version}`, danger: true,
      run: async () => {
        await act("DELETE", path(name, `?version=${version}`));
        say(`Version ${version} of ${name} is forgotten.`);
      },
    });
  }
}

function howToCall({ name }) {
  const quoted = JSON.stringify({ model: name, prompt: "Hello", max_tokens: 32 }).replaceAll("'", "'\\''");
  const key = access().generate && !access().tenant ? "" : ' \\\n  -H "authorization: Bearer $API_KEY"';
  return h("div", {}, h("h3", {}, "Use it"),
    command(`curl ${new URL("v1/completions", document.baseURI)} \\\n  -H "content-type: application/json"${key} \\\n  -d '${quoted}'`));
}
