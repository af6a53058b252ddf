// Entry point of the scripts of all pages.
import { initActions } from "./actions.js";
import { startLiveUpdates } from "./live-updates.js";
import { localizeTimes } from "./local-times.js";
import { initSubmitForm } from "./submit-form.js";
import { initTimeTravel } from "./time-travel.js";

document.documentElement.classList.add("js");
localizeTimes(document);
initActions();
initSubmitForm();
initTimeTravel();
startLiveUpdates();
