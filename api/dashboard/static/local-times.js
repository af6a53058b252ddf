// The server sends all times in UTC, in <time datetime>. This module is the only place that formats them for display.
// Times are shown in the time zone of the browser; times of today are shown without the date.
const pageLanguage = document.documentElement.lang;
const locale = navigator.languages.find((name) => name.split("-")[0] === pageLanguage) ?? pageLanguage; // such as en-GB
const dateTimeFormat = new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "medium" });
const timeFormat = new Intl.DateTimeFormat(locale, { timeStyle: "medium" });

export function localizeTimes(root) {
  const today = new Date().toDateString();
  for (const element of root.querySelectorAll("time[datetime]")) {
    const date = new Date(element.dateTime);
    if (Number.isNaN(date.valueOf())) continue;
    element.textContent = (date.toDateString() === today ? timeFormat : dateTimeFormat).format(date);
    element.title = element.dateTime;
  }
  for (const element of root.querySelectorAll("[data-time-zone]")) {
    element.textContent = dateTimeFormat.resolvedOptions().timeZone;
  }
}
