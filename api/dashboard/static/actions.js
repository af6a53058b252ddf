// What one may do: each action says what it will touch and asks before it does it, and why, for the log.
import { refresh } from "./live.js";
import { said, tell } from "./said.js";

const AT_ONCE = 4;

/** POST, and return what the service says; what goes wrong has a sentence for people. */
export async function post(address, content) {
  let answer;
  try {
    answer = await fetch(address, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(content),
    });
  } catch {
    return { ok: false, message: said("away"), details: {} };
  }
  const body = await answer.json().catch(() => ({}));
  const position = Number(answer.headers.get("Ledger-Position") ?? 0);
  return { ok: answer.ok, message: body.message ?? String(answer.status), details: body.details ?? {}, body, position };
}

function confirmed(question) {
  const dialog = document.getElementById("ask");
  dialog.querySelector("h2").textContent = question;
  dialog.querySelector("input").value = "";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const reason = dialog.querySelector("input").value.trim();
      resolve(dialog.returnValue === "yes" ? (reason ? { reason } : {}) : null);
    }, { once: true });
  });
}

async function one(button) {
  const content = await confirmed(said("confirm", button.textContent.trim(), button.dataset.what));
  if (content === null) return;
  const answer = await post(button.dataset.action, content);
  tell(answer.ok ? said("done") : answer.message, !answer.ok);
  refresh(answer.position || undefined);
}

async function many(button) {
  const chosen = [...document.querySelectorAll('input[name="job"]:checked')];
  if (!chosen.length) return;
  const content = await confirmed(said("confirm_many", button.textContent.trim(), chosen.length));
  if (content === null) return;
  let done = 0;
  let refused = 0;
  let position = 0;
  const left = chosen.map((box) => box.value);
  const { root } = document.documentElement.dataset;
  const work = async () => {
    for (let id = left.shift(); id !== undefined; id = left.shift()) {
      const answer = await post(`${root}api/events/jobs/${id}/${button.dataset.manyAction}`, content);
      answer.ok ? (done += 1) : (refused += 1);
      position = Math.max(position, answer.position || 0);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  for (const box of chosen) box.checked = false;
  tell(said("done_many", done, refused), refused > 0);
  refresh(position || undefined);
}

export function offerActions() {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.action) one(button);
    else if (button?.dataset.manyAction) many(button);
  });
  document.addEventListener("change", (event) => {
    if (!event.target.matches("input[data-all]")) return;
    for (const box of document.querySelectorAll('input[name="job"]')) box.checked = event.target.checked;
  });
}
