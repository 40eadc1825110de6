/* A conversation on the page: an element a turn. What is pressed goes to `actions`. */

import { messagesOf, shownAnswer } from "./chat.js";
import { icon, make } from "./dom.js";
import { render } from "./markdown.js";
import { label, say } from "./words.js";

/** A button with a drawing, known by `act` when focus has to come back to it. */
function tool(name, key, act, onclick, attributes = {}) {
  const button = make("button", { type: "button", class: "quiet", "data-act": act, onclick, ...attributes }, icon(name));
  label(button, key);
  return button;
}

export function turnElement(conversation, index, actions) {
  const turn = conversation.turns[index];
  return turn.role === "user" ? userElement(turn, index, actions) : assistantElement(conversation, turn, index, actions);
}

function userElement(turn, index, actions) {
  const made = make("li", { class: "turn user" }, make("h2", { class: "unseen", "data-say": "you" }, say("you")));
  if (turn.editing !== undefined) {
    made.append(editor(turn, index, actions));
    return made;
  }
  made.append(
    make("div", { class: "bubble" }, turn.text),
    make("div", { class: "tools" }, tool("copy", "copy", "copy", (event) => actions.copy(turn.text, event.currentTarget)), tool("edit", "edit", "edit", () => actions.edit(index))),
  );
  return made;
}

function editor(turn, index, actions) {
  const box = make("textarea", { class: "field", rows: "3", "aria-label": say("edit"), "data-act": "editor" });
  box.value = turn.editing;
  box.addEventListener("input", () => (turn.editing = box.value));
  const form = make(
    "form",
    { class: "editor" },
    box,
    make("p", { class: "hint", "data-say": "editHint" }, say("editHint")),
    make(
      "div",
      { class: "row end" },
      make("button", { type: "button", class: "button", "data-say": "cancel", onclick: () => actions.cancelEdit(index) }, say("cancel")),
      make("button", { class: "button main", "data-say": "resend" }, say("resend")),
    ),
  );
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") actions.cancelEdit(index);
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (box.value.trim()) actions.resend(index, box.value.trim());
  });
  return form;
}

function assistantElement(conversation, turn, index, actions) {
  const answer = shownAnswer(turn);
  const last = index === conversation.turns.length - 1;
  const made = make(
    "li",
    { class: `turn assistant ${answer.state}` },
    make("h2", { class: "unseen", "data-say": "assistant" }, say("assistant")),
    divider(conversation, index),
    make("div", { class: "body" }),
  );
  grown(made, answer);
  if (answer.problem) made.append(problem(answer, index, last, actions));
  if (answer.state !== "waiting" && answer.state !== "streaming") made.append(tools(turn, answer, index, last, actions));
  if (turn.commenting) made.append(commentForm(answer, index, actions));
  if (turn.compare) made.append(comparison(turn, index, actions));
  return made;
}

/** Bring the text of an answer up to date in its element. */
export function grown(element, answer) {
  element.className = `turn assistant ${answer.state}`;
  const body = element.querySelector(".body");
  if (answer.text || answer.state !== "waiting") body.querySelector(".waiting")?.remove();
  else if (!body.childNodes.length) body.append(make("p", { class: "waiting", role: "img", "aria-label": say("thinking") }, make("i"), make("i"), make("i")));
  if (answer.text) render(body, answer.text);
}

/** Says that another version answers from here on. */
function divider(conversation, index) {
  const model = shownAnswer(conversation.turns[index]).model;
  const earlier = conversation.turns.slice(0, index).findLast((turn) => turn.role === "assistant" && shownAnswer(turn).model);
  if (!model || !earlier || shownAnswer(earlier).model === model) return null;
  return make("p", { class: "divider" }, make("span", {}, say("switched", model)));
}

function tools(turn, answer, index, last, actions) {
  const made = make("div", { class: "tools" });
  if (turn.answers.length > 1) {
    made.append(
      tool("left", "previous", "previous", () => actions.show(index, turn.shown - 1), { disabled: turn.shown === 0 }),
      make("span", { class: "variant" }, say("variant", turn.shown + 1, turn.answers.length)),
      tool("right", "next", "next", () => actions.show(index, turn.shown + 1), { disabled: turn.shown === turn.answers.length - 1 }),
    );
  }
  if (answer.text) made.append(tool("copy", "copy", "copy", (event) => actions.copy(answer.text, event.currentTarget)));
  if (last && !answer.problem) made.append(tool("again", "regenerate", "regenerate", () => actions.regenerate(index)));
  // Half an answer is neither good nor bad.
  if (answer.state === "done" && answer.text.trim() && answer.id) {
    for (const rating of ["up", "down"]) {
      const pressed = answer.rating === rating;
      made.append(tool("thumb", rating, rating, () => actions.rate(index, pressed ? "none" : rating), { "aria-pressed": String(pressed) }));
    }
  }
  made.append(figures(answer));
  return made;
}

function figures(answer) {
  const parts = [];
  if (answer.state === "stopped") parts.push(say("stopped"));
  if (answer.finish === "length") parts.push(say("cut"));
  if (answer.finish === "content_filter") parts.push(say("filtered"));
  if (answer.speed) parts.push(say("speed", answer.speed.toFixed(answer.speed < 10 ? 1 : 0)));
  if (answer.first !== undefined) parts.push(say("first", answer.first.toFixed(2)));
  if (answer.tokens) parts.push(say("tokens", answer.tokens));
  if (answer.model) parts.push(answer.model);
  return make("span", { class: "figures" }, ...parts.map((part) => make("span", {}, part)));
}

function problem(answer, index, last, actions) {
  const { kind, message, until } = answer.problem;
  const detail = kind === "key" ? say("keyDetail") : message;
  const made = make("div", { class: "problem" }, icon("warning"), make("div", {}, make("strong", {}, say(`errors.${kind}`)), detail ? make("p", {}, detail) : null));
  if (!last) return made;
  if (kind === "key") {
    made.append(make("button", { type: "button", class: "button", "data-act": "key", onclick: () => actions.askKey(index) }, say("giveKey")));
    return made;
  }
  const button = make("button", { type: "button", class: "button", "data-act": "retry", onclick: () => actions.retry(index) });
  made.append(button);
  countdown(button, until);
  return made;
}

/** Let a button wait for as long as the server asked. */
function countdown(button, until) {
  const left = Math.ceil((until - Date.now()) / 1000);
  button.disabled = left > 0;
  button.textContent = left > 0 ? say("retryIn", left) : say("retry");
  if (left > 0) setTimeout(() => countdown(button, until), 250);
}

function commentForm(answer, index, actions) {
  const key = answer.rating === "up" ? "commentUp" : "commentDown";
  const box = make("input", { class: "field", maxlength: "2000", "aria-label": say(key), placeholder: say(key), "data-act": "comment", autocomplete: "off" });
  box.value = answer.comment;
  const close = tool("close", "close", "close-comment", () => actions.endComment(index));
  const form = make("form", { class: "comment" }, box, make("button", { class: "button" }, say("sendComment")), close);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    actions.comment(index, box.value.trim());
  });
  return form;
}

function comparison(turn, index, actions) {
  const [one, two] = turn.compare;
  const button = (text, better, act) => make("button", { type: "button", class: "button", "data-act": act, onclick: () => actions.compare(index, better) }, text);
  return make(
    "div",
    { class: "which", role: "group", "aria-label": say("which") },
    make("span", {}, say("which")),
    make("div", { class: "row" }, button(say("better", one + 1), one, "better-one"), button(say("better", two + 1), two, "better-two"), button(say("tie"), null, "tie")),
    tool("close", "dismiss", "dismiss", () => actions.dismiss(index)),
  );
}

/** What POST /v1/feedback gets for an answer, and for two answers to compare. */
export function ratingBody(conversation, index) {
  const answer = shownAnswer(conversation.turns[index]);
  return { rating: answer.rating, comment: answer.comment, ...known(conversation, index, answer) };
}

export function comparisonBody(conversation, index, better) {
  const { answers, compare } = conversation.turns[index];
  const first = better ?? compare[0];
  const second = compare.find((number) => number !== first);
  const { answer, response, model } = known(conversation, index, answers[second]);
  return { rating: better === null ? "tie" : "better", ...known(conversation, index, answers[first]), other: { answer, response, model } };
}

const known = (conversation, index, answer) => ({
  answer: answer.id,
  response: answer.text,
  model: answer.model,
  messages: messagesOf(conversation, index, answer.system),
});
