// The server's public routes. Keys go into one header, never into an address.

import { keyFor } from "./session.js";

// The server said no; `message` is its own words.
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

// The server did not answer at all.
export class OfflineError extends Error {
  constructor() {
    super("The server cannot be reached.");
  }
}

let onOffline = () => {};
export const whenOffline = (listener) => (onOffline = listener);

// Relative to the page, so that it works behind a proxy that adds a prefix.
export const address = (path) => new URL(path.replace(/^\//, ""), document.baseURI).href;
export const segment = encodeURIComponent;

// A response whose status is fine. purpose: whose key is sent (see session.js), "" for none;
// `key`: that one instead. Raises ApiError, OfflineError, or AbortError.
export async function send(method, path, { purpose = "", key, body, signal } = {}) {
  const headers = {};
  const sent = key ?? (purpose ? keyFor(purpose) : undefined);
  if (sent) headers.authorization = `Bearer ${sent}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && !canTravel(sent)) throw unsendable();
    onOffline();
    throw new OfflineError();
  }
  if (!response.ok) throw await failure(response);
  return response;
}

// Headers hold Latin-1; the browser refuses others before anything is sent.
const canTravel = (key) => !key || /^[\x20-\x7e\xa0-\xff]*$/.test(key);
const unsendable = () =>
  new ApiError(401, { message: "This cannot be a key: it holds characters that no key has." });

async function failure(response) {
  let error = null;
  try {
    ({ error } = await response.json());
  } catch {
    // Not from DeltaServe: a proxy, perhaps.
  }
  if (typeof error?.message !== "string") {
    error = { message: `The server answered ${response.status} ${response.statusText}`.trim() };
  }
  return new ApiError(response.status, error);
}

export async function get(path, options) {
  const response = await send("GET", path, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    onOffline(); // cut off midway
    throw new OfflineError();
  }
}

export async function change(method, path, body) {
  return (await send(method, path, { purpose: "manage", body })).json();
}

// A sentence for people, from whatever was thrown.
export function words(error) {
  if (error instanceof OfflineError) {
    return "The connection to the server was lost. What you asked for may still happen: look again once it is back.";
  }
  if (!(error instanceof ApiError)) return `The console itself failed: ${error.message}`;
  const said = sentence(error.message);
  if (error.status === 401) return `The server does not take this key. ${said}`;
  return said;
}

function sentence(message) {
  const begun = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?…]$/.test(begun) ? begun : `${begun}.`;
}
