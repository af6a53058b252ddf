// The submission form: a batch from pasted or dropped JSON. The service validates the batch before it can be submitted.
import { postJson } from "./actions.js";
import { formatMessage } from "./messages.js";

export function initSubmitForm() {
  const form = document.getElementById("submit-form");
  if (!form) return;
  const { batch_json: batchJson, batch_name: batchName, job_type: jobType, file, validate } = form.elements;
  const submitButton = form.querySelector('button[type="submit"]');
  const validationResults = document.getElementById("validation-results");
  let validatedBatch = null;

  const showResults = (lines, isError) => {
    const paragraph = (line) =>
      Object.assign(document.createElement("p"), { textContent: line, className: isError ? "warning" : "" });
    validationResults.replaceChildren(...lines.map(paragraph));
  };
  const invalidate = () => {
    validatedBatch = null;
    submitButton.disabled = true;
    validationResults.replaceChildren();
  };
  const loadFile = async (selectedFile) => {
    if (!selectedFile) return;
    batchJson.value = await selectedFile.text();
    invalidate();
  };

  file.addEventListener("change", () => loadFile(file.files[0]));
  for (const element of [batchJson, batchName, jobType]) element.addEventListener("input", invalidate);
  batchJson.addEventListener("dragover", (event) => event.preventDefault());
  batchJson.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    loadFile(event.dataTransfer.files[0]);
  });
  validate.addEventListener("click", async () => {
    invalidate();
    let batch;
    try {
      batch = toBatch(JSON.parse(batchJson.value), batchName.value.trim(), jobType.value);
    } catch (error) {
      return showResults([formatMessage("invalid_json", error.message)], true);
    }
    const result = await postJson(form.dataset.validateUrl, batch);
    if (!result.ok) {
      const errors = result.details.errors ?? [];
      return showResults(errors.length ? errors.map(({ path, message }) => `${path}: ${message}`) : [result.message], true);
    }
    validatedBatch = batch;
    submitButton.disabled = false;
    showResults([formatMessage("validation_passed", result.data.jobs)], false);
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!validatedBatch) return;
    submitButton.disabled = true;
    const result = await postJson(form.dataset.submitUrl, validatedBatch);
    if (!result.ok) return showResults([result.message], true);
    const batchUrl = form.dataset.batchUrl + result.data.batch_id;
    const secrets = result.data.webhook_secrets ?? [];
    if (!secrets.length) return location.assign(batchUrl);
    // The secrets are shown only once, so the page stays open until the user follows the link.
    showResults([formatMessage("new_webhook_secrets"), ...secrets.map(({ url, secret }) => `${url} ${secret}`)], false);
    validationResults.append(
      Object.assign(document.createElement("a"), { href: batchUrl, textContent: result.data.batch_id }),
    );
  });
}

/** Return a batch. `value` is a batch, a list of jobs, a list of job parameters, or one of these. */
function toBatch(value, name, jobType) {
  const batch = Array.isArray(value?.jobs) ? { ...value } : { jobs: [value].flat() };
  const toJob = (job) => (Object.hasOwn(Object(job), "parameters") ? job : { parameters: job });
  batch.jobs = batch.jobs.map((job) => ({ job_type: jobType, ...toJob(job) }));
  if (name) batch.batch_name = name;
  return batch;
}
