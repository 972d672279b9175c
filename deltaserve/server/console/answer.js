// One column of the playground: a model's answer as it comes, its times and counts.

import { words } from "./api.js";
import { button, h, set, text } from "./dom.js";
import * as f from "./format.js";
import { stream } from "./sse.js";

const FACTS = {
  first: "First token",
  total: "In all",
  rate: "Speed",
  tokens: "Generated",
  prompt: "Prompt",
};
const REASONS = { stop: "ended by itself", length: "reached max tokens", abort: "aborted by the server" };

export function answerColumn(model) {
  const stop = button("Stop", () => abort.abort(), "small", { "aria-label": `Stop ${model}` });
  const said = h("div", { class: "answer-text", tabindex: "0", role: "region", "aria-label": `Answer of ${model}` });
  const problem = h("p", { class: "problem box", role: "alert", hidden: true });
  const state = h("p", { class: "hint" }, "Waiting for the first token …");
  const values = Object.fromEntries(Object.keys(FACTS).map((name) => [name, h("dd", {}, f.NONE)]));
  const facts = h("dl", { class: "answer-facts" }, Object.entries(FACTS).map(([name, label]) => h("div", {}, h("dt", {}, label), values[name])));
  const node = h("article", { class: "card answer" },
    h("div", { class: "answer-head" }, h("h3", {}, model), stop),
    h("div", { class: "part" }, said, problem, state), facts);
  const abort = new AbortController();
  const seen = { text: "", reason: null, usage: null, first: null, last: null, pieces: 0 };
  let began = 0;

  function see(piece) {
    const now = performance.now();
    if (piece.text) {
      seen.first ??= now;
      seen.last = now;
      seen.pieces += 1;
      seen.text += piece.text;
      const following = said.scrollHeight - said.scrollTop - said.clientHeight < 24;
      said.append(piece.text);
      if (following) said.scrollTop = said.scrollHeight;
    }
    seen.reason = piece.reason ?? seen.reason;
    seen.usage = piece.usage ?? seen.usage;
    show(now);
  }

  // Times are this browser's: what a user of the API would see. Counts are the server's.
  function show(now) {
    const { usage, first, last } = seen;
    text(values.first, first === null ? f.NONE : f.seconds((first - began) / 1000));
    text(values.total, f.seconds((now - began) / 1000));
    if (!usage) return text(state, first === null ? "Waiting for the first token …" : "Answering …");
    const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = usage;
    const between = last - first;
    text(values.tokens, f.several(tokens, "token"));
    text(values.prompt, f.several(prompt, "token"));
    if (details?.cached_tokens) values.prompt.append(h("span", { class: "hint" }, ` ${f.count(details.cached_tokens)} cached`));
    text(values.rate, tokens > 1 && between > 0 ? `${f.short(((tokens - 1) * 1000) / between)} tokens/s` : f.NONE);
  }

  function end(how) {
    stop.hidden = true;
    set(node, "class", "card answer");
    if (!seen.text) {
      said.classList.add("none");
      text(said, "Nothing was generated.");
      if (!problem.hidden) said.hidden = true;
    }
    text(state, how);
  }

  // Never raises: what fails is shown in the column. Gives how it ended.
  node.run = async (path, body) => {
    began = performance.now();
    set(node, "class", "card answer running");
    try {
      await stream(path, { ...body, model }, { signal: abort.signal, see });
      end(`Done: ${REASONS[seen.reason] ?? seen.reason ?? "ended"}.`);
      return "done";
    } catch (error) {
      if (error.name === "AbortError") {
        end(`Stopped by you after ${f.seconds((performance.now() - began) / 1000)}.`);
        return "stopped";
      }
      problem.hidden = false;
      text(problem, words(error));
      end("Failed.");
      return "failed";
    }
  };
  node.stop = () => abort.abort();
  return node;
}
