// What every page has: times in the reader's own way, actions, and, where something moves, life.
import { localise } from "./times.js";
import { offerActions } from "./actions.js";
import { keepLive } from "./live.js";
import { offerSubmission } from "./submit.js";
import { offerThen } from "./then.js";

document.documentElement.classList.add("js");
localise(document);
offerActions();
offerSubmission();
offerThen();
keepLive();
