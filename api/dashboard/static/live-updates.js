// Live updates: a stream reports new events; the page then fetches itself again and applies the differences.
// An idle system causes no requests. The stream resumes after an outage from its last event ID, so no event is missed.
import { localizeTimes } from "./local-times.js";
import { formatMessage } from "./messages.js";
import { morph } from "./morph.js";

const MIN_REFRESH_INTERVAL_MS = 1000;
const { root, liveSource, position } = document.documentElement.dataset;
let latestPosition = Number(position);
let lastRefreshAt = Date.now();
let refreshTimer = null;

export function startLiveUpdates() {
  if (liveSource) connectStream();
}

/** Refresh the page soon, with a response that includes all events up to a position. */
export function scheduleRefresh(minPosition) {
  latestPosition = Math.max(latestPosition, minPosition);
  refreshTimer ??= setTimeout(refreshPage, Math.max(50, MIN_REFRESH_INTERVAL_MS - (Date.now() - lastRefreshAt)));
}

async function refreshPage() {
  refreshTimer = null;
  lastRefreshAt = Date.now();
  try {
    const headers = { "Ledger-Position": String(latestPosition) };
    const response = await fetch(location.href, { headers, redirect: "manual" });
    if (response.type === "opaqueredirect") return location.reload();
    if (!response.ok) return;
    const fetchedDocument = new DOMParser().parseFromString(await response.text(), "text/html");
    localizeTimes(fetchedDocument);
    const main = fetchedDocument.querySelector("main");
    if (main) morph(document.querySelector("main"), main);
    document.title = fetchedDocument.title;
    document.dispatchEvent(new Event("page-refreshed"));
  } catch {
    showConnectionState(false); // the stream fails as well, and reconnects
  }
}

function streamUrl() {
  if (liveSource === "views") return `${root}monitoring/events/view-updates`;
  const path = location.pathname.replace(/\/$/, "").split("/");
  const query = new URLSearchParams({ after: String(latestPosition) });
  if (liveSource === "job") query.set("job_id", path.at(-1));
  if (liveSource === "batch") query.set("batch_id", path.at(-1));
  return `${root}api/ledger/stream?${query}`;
}

function connectStream() {
  const stream = new EventSource(streamUrl());
  const onUpdate = (event) => scheduleRefresh(Number(event.lastEventId));
  stream.addEventListener("open", () => showConnectionState(true));
  stream.addEventListener("views_updated", onUpdate);
  const eventTypes = JSON.parse(document.getElementById("event-types").textContent);
  for (const type of eventTypes) stream.addEventListener(type, onUpdate);
  stream.addEventListener("error", () => {
    showConnectionState(false);
    if (stream.readyState !== EventSource.CLOSED) return; // the browser reconnects, with Last-Event-ID
    stream.close();
    refreshPage(); // if the session has ended, the response redirects to the sign-in page
    setTimeout(connectStream, 1000 + 2000 * Math.random());
  });
}

function showConnectionState(isConnected) {
  const status = document.getElementById("live-status");
  status.textContent = formatMessage(isConnected ? "live" : "reconnecting");
  status.classList.toggle("connected", isConnected);
}
