// A page that moves: it hears that something has happened, asks for itself again, and changes what differs.
// Nothing is asked while nothing happens. After an outage the stream goes on where it was, so nothing is missed.
import { morph } from "./morph.js";
import { localise } from "./times.js";
import { said } from "./said.js";

const MOST_OFTEN_MS = 1000;
const { root, live, position } = document.documentElement.dataset;
let heard = Number(position);
let last = Date.now();
let waiting = null;

export function keepLive() {
  if (live) listen();
}

/** Have the page ask for itself soon; the answer is to have everything up to a position. */
export function refresh(upTo = heard) {
  heard = Math.max(heard, upTo);
  waiting ??= setTimeout(ask, Math.max(50, MOST_OFTEN_MS - (Date.now() - last)));
}

async function ask() {
  waiting = null;
  last = Date.now();
  try {
    const answer = await fetch(location.href, { headers: { "Ledger-Position": String(heard) }, redirect: "manual" });
    if (answer.type === "opaqueredirect") return location.reload();
    if (!answer.ok) return;
    const then = new DOMParser().parseFromString(await answer.text(), "text/html");
    localise(then);
    document.documentElement.classList.forEach((name) => then.documentElement.classList.add(name));
    const main = then.querySelector("main");
    if (main) morph(document.querySelector("main"), main);
    document.title = then.title;
    document.dispatchEvent(new Event("refreshed"));
  } catch {
    show(false); // the stream notices as well, and comes back by itself
  }
}

function address() {
  if (live === "pulse") return `${root}monitoring/events/pulse`;
  const path = location.pathname.replace(/\/$/, "").split("/");
  const query = new URLSearchParams({ after: String(heard) });
  if (live === "job") query.set("job_id", path.at(-1));
  if (live === "batch") query.set("batch_id", path.at(-1));
  return `${root}api/ledger/stream?${query}`;
}

function listen() {
  const stream = new EventSource(address());
  const happened = (event) => refresh(Number(event.lastEventId));
  stream.addEventListener("open", () => show(true));
  stream.addEventListener("moved", happened);
  for (const type of JSON.parse(document.getElementById("event-types").textContent)) stream.addEventListener(type, happened);
  stream.addEventListener("error", () => {
    show(false);
    if (stream.readyState !== EventSource.CLOSED) return; // it comes back by itself, with Last-Event-ID
    stream.close();
    ask(); // the sign-in may have ended: then the page itself leads to the sign-in
    setTimeout(listen, 1000 + 2000 * Math.random());
  });
}

function show(connected) {
  const sign = document.getElementById("pulse");
  sign.textContent = said(connected ? "live" : "reconnecting");
  sign.classList.toggle("on", connected);
}
