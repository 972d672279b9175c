// One model: its facts, and what is done with a delta: pin, roll back, serve another version, forget
// one, unload.

import { change, segment, words } from "./api.js";
import { button, chip, command, h, keyed, showFacts, text } from "./dom.js";
import * as dialog from "./dialog.js";
import * as f from "./format.js";
import { openPublish } from "./publish_form.js";
import { access } from "./session.js";
import { say } from "./toast.js";
import { find, refreshed, STATES, TIERS } from "./view_models.js";

const path = (name, end = "") => `v1/deltas/${segment(name)}${end}`;

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
    showFacts(facts, factsOf(now));
    if (!manages) return;
    showVersions(versions, now, act);
    text(buttons.pin, now.pinned ? "Unpin" : "Pin");
    buttons.back.hidden = !previous(now);
  }

  function makeButtons() {
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

function factsOf(model) {
  const [kind, label] = STATES[model.state] ?? ["", model.state];
  const { bytes } = model;
  return [
    ["State", chip(kind, label)],
    ["Tier", TIERS[model.tier] ?? model.tier],
    ["Requests", f.count(model.requests)],
    ["In memory", bytes ? f.bytes(bytes.resident) : f.NONE],
    ["On disk", bytes ? f.bytes(bytes.disk) : f.NONE],
    ["As a whole model", bytes ? f.bytes(bytes.full) : f.NONE],
    ["Codecs", model.codecs?.length ? model.codecs.join(", ") + (model.merged ? ", merged" : "") : null],
    ["Longest sequence", model.max_model_len ? `${f.count(model.max_model_len)} tokens` : null],
    ["Digest", model.digest ? h("code", { class: "break" }, model.digest) : null, "whole"],
  ].filter(([, value]) => value !== null);
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
  const serve = button("Serve", activate, "small", { "aria-label": `Serve version ${version}` });
  const drop = button("Forget", forget, "small", { "aria-label": `Forget version ${version}` });
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
