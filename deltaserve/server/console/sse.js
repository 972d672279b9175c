// Server-sent events as the completion routes send them, and what they add up to.

import { ApiError, OfflineError, send } from "./api.js";

// The parsed data of each event, up to [DONE]. Raises ApiError for an event with an error,
// OfflineError if the stream ends before it is done.
async function* events(response) {
  let rest = "";
  for await (const part of chunks(response)) {
    const lines = (rest + part).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(500, event.error);
      yield event;
    }
  }
  throw new OfflineError();
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new OfflineError(); // cut off midway
  } finally {
    reader.cancel().catch(() => {}); // the server stops as well
  }
}

// Runs one request and tells `see` of each piece: {text, reason, usage}. Chat or completion, as
// the path says.
export async function stream(path, body, { signal, see }) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("POST", path, { purpose: "generate", body: asked, signal });
  for await (const { choices, usage } of events(response)) {
    const choice = choices[0];
    see({
      text: choice?.delta?.content ?? choice?.text ?? "",
      reason: choice?.finish_reason ?? null,
      usage: usage ?? null,
    });
  }
}
