// Texts of the scripts, in the language of the page.
const messages = JSON.parse(document.getElementById("script-messages").textContent);

/** Return a message with its placeholders filled. A message with plural forms takes its form from the first argument. */
export function formatMessage(key, ...args) {
  const forms = messages[key];
  const text = forms[args[0] === 1 ? 0 : forms.length - 1];
  return text.replace(/\{(\d)\}/g, (_, index) => String(args[index]));
}

let hideTimer = null;

/** Show a short message at the bottom of the page. Screen readers announce it. */
export function showToast(text, isError = false) {
  const toast = document.getElementById("toast");
  toast.textContent = text;
  toast.classList.toggle("error", isError);
  clearTimeout(hideTimer);
  hideTimer = setTimeout(() => (toast.textContent = ""), 8000);
}
