// Entry point of the scripts of all pages.
import { initActions } from "./actions.js";
import { startLiveUpdates } from "./live-updates.js";
import { localizeTimes } from "./local-times.js";
import { initSubmitForm } from "./submit-form.js";
import { initPastState } from "./past-state.js";

document.documentElement.classList.add("js");
localizeTimes(document);
initActions();
initSubmitForm();
initPastState();
startLiveUpdates();
