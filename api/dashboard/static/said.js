// The words of scripts, in the language of the page.
const words = JSON.parse(document.getElementById("said").textContent);

export function said(key, ...gaps) {
  return words[key].replace(/\{(\d)\}/g, (_, number) => String(gaps[number]));
}

/** Say something at the foot of the page, to screen readers as well. */
export function tell(text, wrong = false) {
  const place = document.getElementById("told");
  place.textContent = text;
  place.classList.toggle("wrong", wrong);
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => (place.textContent = ""), 8000);
}
