/* The settings: what is changed holds at once, and is kept in this browser. */

import { $ } from "./dom.js";
import { DEFAULTS, writeSettings } from "./store.js";
import { say } from "./words.js";

/** Fields by what they set; those with a number that may be left empty are null then. */
const FIELDS = { temperature: Number, topP: Number, maxTokens: whole, seed: whole, system: String, key: (text) => text.trim() };
const element = (name) => $(`set-${name}`);

function whole(text) {
  return text.trim() === "" ? null : Math.trunc(Number(text));
}

/** Tie the fields of the dialog to `settings`. `keyChanged` is called when another API key was given. */
export function setUpSettings(settings, keyChanged) {
  for (const [name, read] of Object.entries(FIELDS)) {
    element(name).addEventListener("input", (event) => {
      const field = event.currentTarget;
      if (!field.checkValidity()) return;
      settings[name] = read(field.value);
      writeSettings(settings);
      showNumbers(settings);
    });
  }
  let key = settings.key;
  $("settings").addEventListener("close", () => {
    if (settings.key !== key) keyChanged();
    key = settings.key;
  });
  $("reset").addEventListener("click", () => {
    Object.assign(settings, { ...DEFAULTS, key: settings.key });
    writeSettings(settings);
    fill(settings);
  });
  fill(settings);
}

function fill(settings) {
  for (const name of Object.keys(FIELDS)) element(name).value = settings[name] ?? "";
  showNumbers(settings);
}

function showNumbers(settings) {
  for (const name of ["temperature", "topP"]) $(`show-${name}`).textContent = settings[name].toFixed(2);
}

/** Open the dialog, at the API key where that is what is missing. */
export function openSettings(atKey = false) {
  $("settings").showModal();
  if (atKey) element("key").focus();
}

/** A button that deletes everything when it is pressed twice. */
export function setUpRemoveAll(removeAll) {
  const button = $("remove-all");
  const rest = () => {
    button.dataset.say = "removeAll";
    button.textContent = say("removeAll");
    button.classList.remove("danger");
  };
  button.addEventListener("click", () => {
    if (button.dataset.say === "removeAll") {
      button.dataset.say = "removeAllSure";
      button.textContent = say("removeAllSure");
      button.classList.add("danger");
    } else {
      rest();
      removeAll();
    }
  });
  button.addEventListener("blur", rest);
}
