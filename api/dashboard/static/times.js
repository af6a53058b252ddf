// Moments come from the server in UTC; they are shown in the reader's zone, today's without the day.
const language = document.documentElement.lang;
const long = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "medium" });
const short = new Intl.DateTimeFormat(language, { timeStyle: "medium" });

export function localise(within) {
  const today = new Date().toDateString();
  for (const element of within.querySelectorAll("time[datetime]")) {
    const moment = new Date(element.dateTime);
    if (Number.isNaN(moment.valueOf())) continue;
    element.textContent = (moment.toDateString() === today ? short : long).format(moment);
    element.title = element.dateTime;
  }
}
