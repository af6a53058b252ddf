// A slider through a job's events: the job as it was after each of them, as the log tells it.
export function offerThen() {
  const place = document.getElementById("then");
  if (!place) return;
  const slider = place.querySelector("input");
  slider.toggleAttribute("data-own", true);
  place.querySelector("#then-what").toggleAttribute("data-own", true);
  let asked = 0;
  const show = async () => {
    const positions = place.dataset.positions.split(" ");
    const number = (asked += 1);
    const position = positions[Number(slider.value)];
    const answer = await fetch(`${place.dataset.job}?as_of=${position}`).catch(() => null);
    if (!answer?.ok || number !== asked) return;
    const { job } = await answer.json();
    const parts = [`${position}: ${job.status}`, `${job.attempt}/${job.max_attempts}`, `${Math.round(job.progress.percent)} %`];
    place.querySelector("#then-what").textContent = [...parts, job.progress.message, job.worker_id, job.error?.message]
      .filter(Boolean)
      .join(" · ");
  };
  slider.addEventListener("input", show);
  document.addEventListener("refreshed", () => {
    const most = place.dataset.positions.split(" ").length - 1;
    const atEnd = slider.value === slider.max;
    slider.max = String(most);
    if (atEnd) slider.value = slider.max;
  });
  show();
}
