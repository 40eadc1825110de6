/* The page: what is shown, what is pressed, and what follows from it. */

import { readModel, sendFeedback } from "./api.js";
import { grow, messagesOf, newAnswer, requestOf, shownAnswer } from "./chat.js";
import { $, icon, make } from "./dom.js";
import { showLineage } from "./lineage.js";
import { openSettings, setUpRemoveAll, setUpSettings } from "./settings.js";
import { drawSidebar, setUpSidebar, showSidebar } from "./sidebar.js";
import * as store from "./store.js";
import { comparisonBody, grown, ratingBody, turnElement } from "./thread.js";
import { label, language, say, sayAll } from "./words.js";

const settings = store.readSettings();
const running = new Map(); // of each conversation whose answer is being written, what stops it
let conversations = store.readConversations();
let current = conversations.find((conversation) => `#${conversation.id}` === location.hash) ?? store.newConversation();
let model = null; // as /v1/models has it; null before the server answered
let problem = null; // why there is none

// --- the model -------------------------------------------------------------------------------------------------------

let reconnecting = 0;

async function connect(attempt = 0) {
  clearTimeout(reconnecting);
  const lost = problem;
  try {
    model = await readModel(settings.key);
    problem = null;
  } catch (error) {
    problem = error;
    if (error.kind !== "key") reconnecting = setTimeout(() => connect(attempt + 1), Math.min(1000 * 2 ** attempt, 15000));
  }
  if (lost && !problem) announce(say("back"));
  drawModel();
}

function drawModel() {
  const name = model?.id ?? say(problem ? "offline" : "connecting");
  $("model-name").textContent = name;
  $("model-version").textContent = model?.version ? say("version", model.version) : "";
  $("model-version").hidden = !model?.version;
  $("model").className = `model ${problem ? "lost" : model ? "ready" : ""}`;
  $("model").disabled = !model;
  $("prompt").placeholder = say("placeholder", model?.id ?? "Chatloom");
  $("welcome-more").textContent = model ? say("welcomeMore", [model.id, model.version && say("version", model.version)].filter(Boolean).join(" ")) : "";
  $("banner").hidden = !problem;
  if (problem) {
    const action = problem.kind === "key" ? make("button", { type: "button", class: "button", onclick: () => openSettings(true) }, say("giveKey")) : null;
    $("banner").replaceChildren(icon("warning"), make("div", {}, make("strong", {}, say(`errors.${problem.kind}`)), " ", say(problem.kind === "key" ? "keyDetail" : "offlineDetail")), action ?? "");
  }
}

// --- the thread ------------------------------------------------------------------------------------------------------

const scroller = $("scroller");
let following = true; // the end of the thread, while an answer grows

function drawThread() {
  const empty = current.turns.length === 0;
  $("welcome").hidden = !empty;
  $("thread").hidden = empty;
  $("thread").replaceChildren(...current.turns.map((_, index) => turnElement(current, index, actions)));
  document.title = current.title ? `${current.title} · Chatloom` : "Chatloom";
  drawState();
}

/** Draw one turn again; focus stays on the button it was on. */
function drawTurn(index) {
  const old = $("thread").children[index];
  const act = old.contains(document.activeElement) ? document.activeElement.dataset.act : null;
  const made = turnElement(current, index, actions);
  old.replaceWith(made);
  if (act) made.querySelector(`[data-act="${act}"]`)?.focus();
  return made;
}

function drawState() {
  const busy = running.has(current.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("thread").setAttribute("aria-busy", String(busy));
  $("send").disabled = $("prompt").value.trim() === "";
  drawSidebar(conversations, current.id, running, { open, remove });
}

function toEnd(smooth = false) {
  following = true;
  scroller.scrollTo({ top: scroller.scrollHeight, behavior: smooth ? "smooth" : "instant" });
}

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;

function announce(text) {
  $("announcement").textContent = text;
}

function toast(text, action = null) {
  const made = make("div", { class: "toast" }, text);
  if (action) {
    made.append(
      make("button", { type: "button", class: "link", onclick: () => {
        made.remove();
        action.run();
      } }, action.text),
    );
  }
  $("toasts").replaceChildren(made);
  setTimeout(() => made.remove(), 6000);
}

// --- conversations ---------------------------------------------------------------------------------------------------

/** Keep a conversation; it goes to the top of the list. */
function keep(conversation) {
  conversation.changed = Date.now();
  if (!store.writeConversation(conversation)) toast(say("errors.full"));
  conversations = [conversation, ...conversations.filter((other) => other.id !== conversation.id)];
}

function show(conversation) {
  current = conversation;
  history.replaceState(null, "", conversation.turns.length ? `#${conversation.id}` : location.pathname);
  showSidebar(false);
  drawThread();
  toEnd();
}

function open(id) {
  show(conversations.find((conversation) => conversation.id === id));
  $("prompt").focus();
}

function startNew() {
  show(store.newConversation());
  $("prompt").focus();
}

function remove(id) {
  const removed = conversations.find((conversation) => conversation.id === id);
  running.get(id)?.abort();
  store.removeConversation(id);
  conversations = conversations.filter((conversation) => conversation.id !== id);
  if (current.id === id) startNew();
  else drawState();
  toast(say("removed"), {
    text: say("undo"),
    run: () => {
      keep(removed);
      show(removed);
    },
  });
}

// --- answers ---------------------------------------------------------------------------------------------------------

function ask(text) {
  const last = current.turns.at(-1);
  if (last) last.used = last.shown;
  if (!current.title) current.title = text.replace(/\s+/g, " ").slice(0, 60);
  current.turns.push({ role: "user", text }, { role: "assistant", answers: [], shown: 0 });
  answer(current.turns.length - 1);
}

/** Have another answer written at the turn `index`, the last one. */
async function answer(index) {
  const conversation = current;
  const turn = conversation.turns[index];
  const made = newAnswer(settings.system.trim());
  turn.answers.push(made);
  turn.shown = turn.answers.length - 1;
  turn.compare = null;
  turn.commenting = false;
  const stopper = new AbortController();
  running.set(conversation.id, stopper);
  keep(conversation);
  history.replaceState(null, "", `#${conversation.id}`);
  drawThread();
  toEnd();
  announce(say("thinking"));

  let drawing = 0;
  const draw = () => {
    drawing = 0;
    if (current !== conversation) return;
    grown($("thread").children[index], made);
    if (following) toEnd();
  };
  if (!model) await connect();
  const request = requestOf(model?.id ?? "", messagesOf(conversation, index, made.system), settings, turn.shown);
  try {
    await grow(made, request, settings.key, stopper.signal, () => (drawing ||= requestAnimationFrame(draw)));
  } finally {
    cancelAnimationFrame(drawing);
    running.delete(conversation.id);
  }
  finish(conversation, turn, made);
}

function finish(conversation, turn, made) {
  const before = turn.answers.at(-2);
  if (before && rateable(made) && rateable(before) && made.text.trim() !== before.text.trim()) turn.compare = [turn.answers.length - 2, turn.answers.length - 1];
  if (conversations.includes(conversation)) keep(conversation);
  if (current === conversation) {
    drawTurn(conversation.turns.indexOf(turn));
    if (following) toEnd();
    announce(made.problem ? say(`errors.${made.problem.kind}`) : `${say("answered")} ${made.text}`);
  }
  drawState();
  // Another version, or another server, answers by now.
  const known = model && (model.version ? `${model.id}/${model.version}` : model.id);
  if (["gone", "offline", "loading", "key"].includes(made.problem?.kind) || (made.model && made.model !== known)) connect();
}

const rateable = (answer) => answer.state === "done" && answer.id && answer.text.trim();

const actions = {
  async copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      toast(say("notCopied"));
      return;
    }
    const before = [...button.childNodes];
    const named = button.dataset.sayLabel;
    button.replaceChildren(icon("check"));
    label(button, "copied");
    announce(say("copied"));
    setTimeout(() => {
      button.replaceChildren(...before);
      label(button, named);
    }, 1500);
  },
  edit(index) {
    if (running.has(current.id)) return;
    current.turns[index].editing = current.turns[index].text;
    drawTurn(index).querySelector("textarea").focus();
  },
  cancelEdit(index) {
    delete current.turns[index].editing;
    drawTurn(index).querySelector('[data-act="edit"]').focus();
  },
  resend(index, text) {
    if (running.has(current.id)) return;
    current.turns.length = index;
    if (index === 0) current.title = "";
    ask(text);
    $("prompt").focus();
  },
  regenerate(index) {
    if (!running.has(current.id)) answer(index);
  },
  /** Once more in the place of an answer that failed. */
  retry(index) {
    if (running.has(current.id)) return;
    current.turns[index].answers.splice(current.turns[index].shown, 1);
    answer(index);
  },
  askKey(index) {
    openSettings(true);
    $("settings").addEventListener("close", () => settings.key && actions.retry(index), { once: true });
  },
  show(index, number) {
    current.turns[index].shown = number;
    current.turns[index].commenting = false;
    drawTurn(index);
  },
  async rate(index, rating) {
    const turn = current.turns[index];
    const rated = shownAnswer(turn);
    const before = rated.rating;
    rated.rating = rating;
    if (rating === "none") rated.comment = "";
    turn.commenting = rating !== "none";
    drawTurn(index);
    if (await kept(ratingBody(current, index))) keep(current);
    else {
      rated.rating = before;
      turn.commenting = false;
      drawTurn(index);
    }
  },
  async comment(index, text) {
    const turn = current.turns[index];
    shownAnswer(turn).comment = text;
    if (text && !(await kept(ratingBody(current, index)))) return;
    keep(current);
    actions.endComment(index);
    if (text) toast(say("thanks"));
  },
  endComment(index) {
    const turn = current.turns[index];
    turn.commenting = false;
    drawTurn(index).querySelector(`[data-act="${shownAnswer(turn).rating}"]`)?.focus();
  },
  async compare(index, better) {
    if (!(await kept(comparisonBody(current, index, better)))) return;
    if (better !== null) current.turns[index].shown = better;
    toast(say("thanks"));
    actions.dismiss(index);
  },
  dismiss(index) {
    current.turns[index].compare = null;
    keep(current);
    drawTurn(index).querySelector('[data-act="regenerate"]')?.focus();
  },
};

let sending = Promise.resolve();

/** Whether the server has kept what was said. One after the other: the last word is the one that counts. */
function kept(body) {
  sending = sending.then(() => sendFeedback(settings.key, body)).then(
    () => true,
    (error) => {
      toast(error.kind === "gone" ? say("noFeedback") : `${say("notKept")}: ${say(`errors.${error.kind}`)}`);
      return false;
    },
  );
  return sending;
}

// --- what is around it -----------------------------------------------------------------------------------------------

const THEMES = { auto: ["contrast", "themeAuto"], light: ["sun", "themeLight"], dark: ["moon", "themeDark"] };
const touch = matchMedia("(pointer: coarse)");

function drawTheme() {
  const [drawing, name] = THEMES[document.documentElement.dataset.theme];
  $("theme").replaceChildren(icon(drawing));
  label($("theme"), name);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  document.documentElement.dataset.theme = next;
  store.choose("theme", next);
  drawTheme();
}

function otherLanguage() {
  document.documentElement.lang = language() === "en" ? "zh" : "en";
  store.choose("language", language());
  drawWords();
}

/** Everything that says something. */
function drawWords() {
  sayAll();
  $("fine").textContent = say(touch.matches ? "enterTouch" : "enter");
  $("suggestions").replaceChildren(
    ...say("suggestions").map(([name, text]) => make("button", { type: "button", class: "suggestion", onclick: () => ask(text) }, make("strong", {}, name), make("span", {}, text))),
  );
  drawModel();
  drawTheme();
  drawThread();
}

function fitPrompt() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 240)}px`;
}

function submit() {
  const text = $("prompt").value.trim();
  if (!text || running.has(current.id)) return;
  $("prompt").value = "";
  fitPrompt();
  ask(text);
}

function openLineage() {
  if (!model) return;
  showLineage($("lineage-content"), model, actions.copy);
  $("lineage").showModal();
}

function setUp() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("prompt").addEventListener("input", () => {
    fitPrompt();
    $("send").disabled = $("prompt").value.trim() === "";
  });
  $("prompt").addEventListener("keydown", (event) => {
    // 229: an input method takes this Enter, to choose characters.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && !touch.matches) {
      event.preventDefault();
      submit();
    } else if (event.key === "Escape") running.get(current.id)?.abort();
  });
  $("stop").addEventListener("click", () => {
    running.get(current.id)?.abort();
    $("prompt").focus();
  });
  for (const button of document.querySelectorAll(".new-chat")) button.addEventListener("click", startNew);
  $("model").addEventListener("click", openLineage);
  for (const button of document.querySelectorAll(".open-settings")) button.addEventListener("click", () => openSettings());
  $("theme").addEventListener("click", nextTheme);
  $("language").addEventListener("click", otherLanguage);
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    // A press beside it lands on the dialog itself.
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
  $("thread").addEventListener("click", (event) => {
    const button = event.target.closest(".copy-code");
    if (button) actions.copy(button.closest("figure").querySelector("code").textContent, button);
  });
  $("to-end").addEventListener("click", () => toEnd(true));
  scroller.addEventListener("scroll", () => {
    following = atEnd();
    $("to-end").hidden = following;
  });
  addEventListener("pagehide", () => conversations.filter(({ id }) => running.has(id)).forEach(store.writeConversation));
  addEventListener("visibilitychange", () => document.visibilityState === "visible" && connect());
  store.watchConversations(() => {
    const others = store.readConversations().filter((conversation) => !running.has(conversation.id) && conversation.id !== current.id);
    conversations = [...conversations.filter((conversation) => running.has(conversation.id) || conversation.id === current.id), ...others].sort((one, other) => other.changed - one.changed);
    drawState();
  });
  setUpSidebar();
  setUpSettings(settings, connect);
  setUpRemoveAll(() => {
    for (const stopper of running.values()) stopper.abort();
    for (const { id } of conversations) store.removeConversation(id);
    conversations = [];
    $("settings").close();
    startNew();
  });
}

setUp();
drawWords();
toEnd();
connect();
if (!touch.matches) $("prompt").focus();
