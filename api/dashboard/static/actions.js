// Actions on jobs, batches and deliveries. Each action asks for confirmation and for a reason for the event log.
import { scheduleRefresh } from "./live-updates.js";
import { formatMessage, showToast } from "./messages.js";

const MAX_PARALLEL_REQUESTS = 4;

/** POST JSON. Return the parsed response; on an error, `message` is the text to show. */
export async function postJson(url, body) {
  let response;
  try {
    response = await fetch(url, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    return { ok: false, message: formatMessage("service_unreachable"), details: {}, position: 0 };
  }
  const data = await response.json().catch(() => ({}));
  const position = Number(response.headers.get("Ledger-Position") ?? 0);
  return { ok: response.ok, message: data.message ?? String(response.status), details: data.details ?? {}, data, position };
}

/** Ask for confirmation. Return the request body with the reason, or null if the user dismisses the dialog. */
function confirmAction(question, confirmLabel) {
  const dialog = document.getElementById("confirm-dialog");
  dialog.querySelector("h2").textContent = question;
  dialog.querySelector('button[value="confirm"]').textContent = confirmLabel;
  dialog.querySelector("input").value = "";
  dialog.returnValue = "dismiss";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const reason = dialog.querySelector("input").value.trim();
      resolve(dialog.returnValue === "confirm" ? (reason ? { reason } : {}) : null);
    }, { once: true });
  });
}

/** Ask for confirmation, then send a request to each URL. Return the results: none if the user dismisses the dialog. */
async function runActions(button, question, urls) {
  const body = await confirmAction(question, button.textContent.trim());
  const results = [];
  if (body === null) return results;
  const postNext = async () => {
    for (let url = urls.shift(); url !== undefined; url = urls.shift()) results.push(await postJson(url, body));
  };
  await Promise.all(Array.from({ length: MAX_PARALLEL_REQUESTS }, postNext));
  scheduleRefresh(Math.max(...results.map((result) => result.position)));
  return results;
}

async function runAction(button) {
  const [result] = await runActions(button, button.dataset.question, [button.dataset.actionUrl]);
  if (result) showToast(result.ok ? formatMessage("action_done") : result.message, !result.ok);
}

const selectedJobs = () => [...document.querySelectorAll('input[name="job"]:checked')];

async function runBulkAction(button) {
  const checkboxes = selectedJobs();
  const { bulkAction } = button.dataset;
  const { root } = document.documentElement.dataset;
  const urls = checkboxes.map((checkbox) => `${root}api/events/jobs/${checkbox.value}/${bulkAction}`);
  const results = await runActions(button, formatMessage(`confirm_bulk_${bulkAction}`, urls.length), urls);
  if (!results.length) return;
  for (const checkbox of checkboxes) checkbox.checked = false;
  showSelection();
  const rejected = results.filter((result) => !result.ok).length;
  showToast(formatMessage("bulk_result", results.length - rejected, rejected), rejected > 0);
}

/** Show the number of selected jobs. Bulk actions are enabled only with a selection. */
function showSelection() {
  const bar = document.querySelector("[data-bulk-actions]");
  if (!bar) return;
  const count = selectedJobs().length;
  bar.querySelector("[data-selection]").textContent = formatMessage("selection", count);
  for (const button of bar.querySelectorAll("button")) button.disabled = count === 0;
}

export function initActions() {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.actionUrl) runAction(button);
    else if (button?.dataset.bulkAction) runBulkAction(button);
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("input[data-select-all]")) {
      for (const checkbox of document.querySelectorAll('input[name="job"]')) checkbox.checked = event.target.checked;
    }
    showSelection();
  });
  document.addEventListener("page-refreshed", showSelection);
  showSelection(); // a browser may restore checkboxes when the user goes back to a page
}
