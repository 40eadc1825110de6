/* The list of conversations; beside the thread on a wide screen, above it on a narrow one. */

import { $, icon, make } from "./dom.js";
import { label, say } from "./words.js";

/** Draw the list; `open` and `remove` get a conversation's id. */
export function drawSidebar(conversations, currentId, running, { open, remove }) {
  const today = new Date().toDateString();
  const groups = { today: [], earlier: [] };
  for (const conversation of conversations) groups[new Date(conversation.changed).toDateString() === today ? "today" : "earlier"].push(conversation);
  const parts = Object.entries(groups).filter(([, found]) => found.length).flatMap(([name, found]) => [
    make("h2", {}, say(name)),
    make("ul", {}, ...found.map((conversation) => entry(conversation, conversation.id === currentId, running.has(conversation.id), open, remove))),
  ]);
  $("conversations").replaceChildren(...(parts.length ? parts : [make("p", { class: "hint" }, say("empty"))]));
}

function entry(conversation, current, busy, open, remove) {
  const title = make("button", { type: "button", class: "entry", "aria-current": current ? "true" : null, onclick: () => open(conversation.id) }, conversation.title);
  const bin = make("button", { type: "button", class: "quiet", onclick: () => remove(conversation.id) }, icon("bin"));
  label(bin, "remove");
  return make("li", { class: busy ? "busy" : null }, title, bin);
}

const narrow = matchMedia("(max-width: 820px)");

/** Open or close it on a narrow screen, where what is behind it waits. */
export function showSidebar(open) {
  const shown = open && narrow.matches;
  document.body.classList.toggle("sidebar-open", shown);
  $("sidebar").inert = narrow.matches && !shown;
  $("main").inert = shown;
  $("scrim").hidden = !shown;
  $("open-sidebar").setAttribute("aria-expanded", String(shown));
}

export function setUpSidebar() {
  const close = () => {
    showSidebar(false);
    $("open-sidebar").focus();
  };
  $("open-sidebar").addEventListener("click", () => {
    showSidebar(true);
    $("close-sidebar").focus();
  });
  $("close-sidebar").addEventListener("click", close);
  $("scrim").addEventListener("click", close);
  $("sidebar").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && narrow.matches) close();
  });
  narrow.addEventListener("change", () => showSidebar(false));
  showSidebar(false);
}
