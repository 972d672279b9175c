// The page around the views: tabs, the server's state, keys.

import { ApiError, words } from "./api.js";
import { beat, connection, Loop, watch } from "./connection.js";
import { button, h, set, text } from "./dom.js";
import { identify, needsKey, openKeys, signIn, summary } from "./keys.js";
import { access, session } from "./session.js";
import { live } from "./view_live.js";
import { models } from "./view_models.js";
import { playground } from "./view_playground.js";
import { tenants } from "./view_tenants.js";

const VIEWS = [models, tenants, live, playground];
const byId = (id) => document.getElementById(id);
const main = byId("main");
const door = h("section", { id: "door" }, h("p", { class: "loading" }, "Connecting …")); // before there are views
let current = null;
let wanted = null; // the view that the address names
let built = null;

// -- tabs -----------------------------------------------------------------------------------

function buildTabs() {
  main.append(door);
  for (const view of VIEWS) {
    view.tab = h("button", {
      type: "button", role: "tab", id: `tab-${view.id}`, "aria-controls": `panel-${view.id}`, hidden: true,
      on: { click: () => choose(view) },
    }, view.title());
    view.panel = h("section", { role: "tabpanel", id: `panel-${view.id}`, "aria-labelledby": view.tab.id, hidden: true });
    view.loop = new Loop(() => turn(view), view.seconds, (error) => troubled(view, error));
    byId("tabs").append(view.tab);
    main.append(view.panel);
  }
  byId("tabs").addEventListener("keydown", arrows);
  addEventListener("hashchange", () => {
    wanted = fromAddress();
    if (wanted && !wanted.tab.hidden) choose(wanted);
  });
}

const fromAddress = () => VIEWS.find(({ id }) => location.hash === `#${id}`);

function arrows(event) {
  const there = VIEWS.filter(({ tab }) => !tab.hidden);
  const at = there.indexOf(current);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: there.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  choose(there[(next + there.length) % there.length]);
  current.tab.focus();
}

function choose(view) {
  if (view === current) return;
  if (current && !current.always) current.loop.stop();
  current = view;
  for (const other of VIEWS) {
    const chosen = other === view;
    set(other.tab, "aria-selected", String(chosen));
    set(other.tab, "tabindex", chosen ? "0" : "-1");
    other.panel.hidden = !chosen;
  }
  document.title = `${view ? view.title() : "Sign in"} · DeltaServe`;
  showBanner();
  if (view === null) return;
  wanted = view;
  if (location.hash !== `#${view.id}`) history.replaceState(null, "", `#${view.id}`);
  view.tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  view.loop.start();
}

// -- what may be seen -----------------------------------------------------------------------

const ask = () => openKeys(rebuild);

// Which parts there are depends on whose keys are held: what they may not see is not there. What
// is there and stays is left alone: somebody may be reading it.
async function rebuild() {
  const may = access();
  showHead();
  const kind = JSON.stringify([session.mode, may, session.tenant?.tenant.id]);
  if (kind !== built) build(may);
  built = kind;
  await Promise.all(VIEWS.filter((view) => view === current || (view.always && view.working)).map((view) => view.loop.start()));
}

// The form that had the focus is gone.
async function entered() {
  const loaded = rebuild();
  current?.tab.focus();
  await loaded;
}

function build(may) {
  for (const view of VIEWS) {
    view.loop.stop();
    view.working = view.allowed(may);
    view.tab.hidden = !view.working && !view.missing?.(may);
    text(view.tab, view.title());
    view.panel.replaceChildren(...parts(view));
  }
  byId("tabs-bar").hidden = !may.see;
  door.hidden = may.see;
  door.replaceChildren(...(may.see ? [] : [signIn(entered)]));
  const there = VIEWS.filter(({ tab }) => !tab.hidden);
  choose(may.see ? there.find((view) => view === wanted) ?? there[0] : null);
  if (!may.see) door.querySelector("input").focus();
}

function parts(view) {
  if (view.working) return view.build({ ask, reload: () => view.loop.now() });
  return view.tab.hidden ? [] : [needsKey(view.title(), view.missing(access()), ask)];
}

async function turn(view) {
  if (!view.working) return;
  await view.refresh();
  view.trouble = null;
  showBanner();
}

function troubled(view, error) {
  if (error instanceof ApiError && error.status === 401) {
    identify().then(rebuild, () => {}); // it was revoked, or has expired
    return;
  }
  if (!(error instanceof ApiError)) console.error(error);
  view.trouble = words(error);
  showBanner();
}

// -- the server's state ---------------------------------------------------------------------

function showHead() {
  text(byId("version"), session.version ?? "");
  text(byId("keys"), summary());
  byId("keys").hidden = session.mode === "none" || !access().see;
  const [kind, said] = stateInWords();
  const place = byId("server-state");
  place.className = `server-state ${kind}`;
  text(place, said);
}

function stateInWords() {
  if (connection.state === "connecting") return ["", "Connecting …"];
  if (connection.state === "lost") return connection.ready === false ? ["warn", "Starting"] : ["bad", "Disconnected"];
  return connection.ready ? ["ok", "Ready"] : ["warn", "Not ready"];
}

const retry = button("Try now", () => beat(), "small");
const bannerWords = h("span");

function showBanner() {
  const banner = byId("banner");
  if (!bannerWords.isConnected) banner.append(bannerWords, retry);
  const lost = connection.state === "lost";
  const unready = connection.state === "online" && connection.ready === false;
  const trouble = current?.trouble;
  let said = "";
  if (lost && connection.ready === false) said = `The server is starting: ${connection.reason}. It is asked again on its own.`;
  else if (lost) said = "Disconnected from the server. What you see is from before; it is asked again on its own, less often each time.";
  else if (unready) said = `The server takes no requests at present: ${connection.reason}`;
  else if (trouble) said = trouble;
  text(bannerWords, said);
  retry.hidden = !lost;
  banner.hidden = !said;
  document.body.classList.toggle("lost", lost);
}

function changed() {
  showHead();
  showBanner();
}

async function restored() {
  await identify();
  connection.state = "online"; // the views may ask
  await rebuild();
}

byId("keys").addEventListener("click", ask);
buildTabs();
wanted = fromAddress();
showHead();
watch({ changed, restored });
