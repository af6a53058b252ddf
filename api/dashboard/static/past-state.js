// A slider over the events of a job. It shows the state of the job as of each event.
import { formatMessage } from "./messages.js";

export function initPastState() {
  const section = document.getElementById("past-state");
  if (!section) return;
  const slider = section.querySelector("input");
  const state = section.querySelector("#past-state-summary");
  for (const element of [slider, state]) element.toggleAttribute("data-morph-ignore", true);
  let requestCount = 0;
  const showState = async () => {
    const positions = section.dataset.positions.split(" ");
    const requestNumber = (requestCount += 1);
    const position = positions[Number(slider.value)];
    const response = await fetch(`${section.dataset.jobUrl}?as_of=${position}`).catch(() => null);
    if (!response?.ok || requestNumber !== requestCount) return; // a newer request replaces this one
    const { job } = await response.json();
    const parts = [
      `${position}: ${formatMessage(job.status)}`,
      job.attempt && formatMessage("attempt_number", job.attempt),
      `${Math.round(job.progress.percent)} %`,
      job.progress.message,
      job.worker_id,
      job.error?.message,
    ];
    state.textContent = parts.filter(Boolean).join(" · ");
  };
  slider.addEventListener("input", showState);
  document.addEventListener("page-refreshed", () => {
    const lastIndex = section.dataset.positions.split(" ").length - 1;
    const isAtEnd = slider.value === slider.max;
    slider.max = String(lastIndex);
    if (isAtEnd) slider.value = slider.max;
  });
  showState();
}
