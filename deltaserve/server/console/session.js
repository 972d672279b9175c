// Who uses the console. Keys live in this tab's sessionStorage at most, and end with the tab.
//
// There can be two: the administrator's, which manages and cannot generate, and a user's (a
// tenant's, or the one key of a server without tenants), which generates and cannot manage.

const SLOT = "deltaserve.keys";

export const session = {
  version: null,
  mode: null, // what the server asks for: none, one (a single key) or tenants
  keys: read(), // {admin, user}
  tenant: null, // what /v1/key says of the user's key
};

function read() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(SLOT) ?? "{}");
    return Object.fromEntries(Object.entries(kept).filter(([, key]) => typeof key === "string"));
  } catch {
    return {}; // storage is switched off, or not ours
  }
}

export function keep(slot, key) {
  session.keys[slot] = key;
  write();
}

export function forget(slot) {
  delete session.keys[slot];
  if (slot === "user") session.tenant = null;
  write();
}

function write() {
  try {
    if (Object.keys(session.keys).length) sessionStorage.setItem(SLOT, JSON.stringify(session.keys));
    else sessionStorage.removeItem(SLOT);
  } catch {
    // They are held until the page is left.
  }
}

// The key for a purpose: "manage" (deltas, tenants, counters), "generate", or "see" (either).
export function keyFor(purpose) {
  const { admin, user } = session.keys;
  if (purpose === "generate") return user;
  if (purpose === "manage") return session.mode === "one" ? user : admin;
  return admin ?? user;
}

export function access() {
  const { mode, keys } = session;
  const open = mode === "none" || (mode === "one" && Boolean(keys.user));
  const admin = mode === "tenants" && Boolean(keys.admin);
  const tenant = mode === "tenants" && Boolean(keys.user);
  return {
    see: open || admin || tenant,
    counters: open || admin,
    manage: admin,
    generate: open || tenant,
    usage: admin || tenant,
    tenant,
  };
}
