// Is the server there? Asked every few seconds; when it has gone, ever less often until it is back.

import { ApiError, get, OfflineError, whenOffline } from "./api.js";

const BEAT_SECONDS = 5;
const LONGEST_WAIT = 15;

export const connection = {
  state: "connecting", // connecting, online or lost
  ready: null, // what /ready says: true or false
  reason: "", // why not
  retryAt: 0,
};

let listeners = { changed: () => {}, restored: async () => {} };
let timer = 0;
let failures = 0;
let asking = null;

// changed(): what is shown of it. restored(): once at the start, and whenever the server is back;
// may fail as any call.
export function watch(given) {
  listeners = given;
  whenOffline(() => {
    if (connection.state === "online") beat();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && connection.state !== "connecting") beat();
  });
  return beat();
}

// Ask now; those who ask meanwhile wait for the same answer.
export function beat() {
  asking ??= ask().finally(() => (asking = null));
  return asking;
}

async function ask() {
  clearTimeout(timer);
  try {
    await readiness();
    if (connection.state !== "online") {
      await listeners.restored();
      connection.state = "online";
      failures = 0;
    }
    again(BEAT_SECONDS);
  } catch (error) {
    connection.state = "lost";
    if (error instanceof OfflineError) connection.ready = null; // else it is there, and not ready
    again(Math.min(2 ** failures, LONGEST_WAIT));
    failures += 1;
    if (!(error instanceof OfflineError || error instanceof ApiError)) throw error;
  }
  listeners.changed();
}

async function readiness() {
  try {
    await get("ready");
    [connection.ready, connection.reason] = [true, ""];
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    [connection.ready, connection.reason] = [false, error.message];
  }
}

function again(seconds) {
  connection.retryAt = Date.now() + seconds * 1000;
  timer = setTimeout(beat, seconds * 1000);
}

// Calls `task` now and then, while the page is seen and the server is there. What fails is tried
// again at the next turn; `failed` is told of it.
export class Loop {
  constructor(task, seconds, failed) {
    [this.task, this.seconds, this.failed] = [task, seconds, failed];
    [this.timer, this.running] = [0, false];
  }

  start() {
    this.running = true;
    return this.now();
  }

  stop() {
    this.running = false;
    clearTimeout(this.timer);
  }

  async now() {
    clearTimeout(this.timer);
    const began = (this.began = {});
    try {
      if (connection.state === "online" && !document.hidden) await this.task();
    } catch (error) {
      if (!(error instanceof OfflineError)) this.failed(error);
    }
    // A later call has its own timer.
    if (this.running && this.began === began) {
      this.timer = setTimeout(() => this.now(), this.seconds * 1000);
    }
  }
}
