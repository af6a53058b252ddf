// A batch from pasted or dropped JSON: checked by the service before it can be sent.
import { post } from "./actions.js";
import { said } from "./said.js";

export function offerSubmission() {
  const form = document.getElementById("submit");
  if (!form) return;
  const { content, batch_name: name, job_type: type, file, check } = form.elements;
  const send = form.querySelector('button[type="submit"]');
  const findings = document.getElementById("findings");
  let ready = null;

  const show = (lines, wrong) => {
    findings.replaceChildren(
      ...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line, className: wrong ? "warning" : "" })),
    );
  };
  const changed = () => {
    ready = null;
    send.disabled = true;
    findings.replaceChildren();
  };
  const read = async (chosen) => {
    if (!chosen) return;
    content.value = await chosen.text();
    changed();
  };

  file.addEventListener("change", () => read(file.files[0]));
  for (const element of [content, name, type]) element.addEventListener("input", changed);
  content.addEventListener("dragover", (event) => event.preventDefault());
  content.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    read(event.dataTransfer.files[0]);
  });
  check.addEventListener("click", async () => {
    changed();
    let asked;
    try {
      asked = batchOf(JSON.parse(content.value), name.value.trim(), type.value);
    } catch (error) {
      return show([said("not_json", error.message)], true);
    }
    const answer = await post(form.dataset.check, asked);
    if (!answer.ok) {
      const errors = answer.details.errors ?? [];
      return show(errors.length ? errors.map(({ path, message }) => `${path}: ${message}`) : [answer.message], true);
    }
    ready = asked;
    send.disabled = false;
    show([said("checked", answer.body.jobs)], false);
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!ready) return;
    send.disabled = true;
    const answer = await post(form.dataset.submit, ready);
    if (!answer.ok) return show([answer.message], true);
    const batch = form.dataset.batch + answer.body.batch_id;
    const secrets = answer.body.webhook_secrets ?? [];
    if (!secrets.length) return location.assign(batch);
    // Shown this once: the page stays until the reader moves on.
    show([said("new_secrets"), ...secrets.map(({ url, secret }) => `${url} ${secret}`)], false);
    findings.append(Object.assign(document.createElement("a"), { href: batch, textContent: answer.body.batch_id }));
  });
}

/** A batch of what may be a list of sessions, a list of jobs, or a batch. */
function batchOf(given, name, type) {
  const batch = Array.isArray(given) ? { jobs: given } : given && Array.isArray(given.jobs) ? { ...given } : { jobs: [given] };
  batch.jobs = batch.jobs.map((job) => (job && typeof job === "object" && "parameters" in job ? job : { parameters: job }));
  batch.jobs = batch.jobs.map((job) => ({ job_type: type, ...job }));
  if (name) batch.batch_name = name;
  return batch;
}
