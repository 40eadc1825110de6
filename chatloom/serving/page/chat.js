/* One answer: what is sent for it, and how it grows. */

import { ApiError, streamChat } from "./api.js";

export const newAnswer = (system) => ({ id: null, text: "", model: null, state: "waiting", system, rating: "none", comment: "" });

export const shownAnswer = (turn) => turn.answers[turn.shown];

/** The conversation up to the answer at turn `index`, as it is sent. Turns alternate: a user's, then its answers. */
export function messagesOf(conversation, index, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (let at = 0; at < index; at += 2) {
    const question = { role: "user", content: conversation.turns[at].text };
    if (at + 1 === index) return [...messages, question];
    const turn = conversation.turns[at + 1];
    // What was on show when the next message was sent; a question that was never answered is left out.
    const { text } = turn.answers[turn.used ?? turn.shown];
    if (text.trim()) messages.push(question, { role: "assistant", content: text });
  }
  return messages;
}

/** The body of a request; what is not set is the server's to decide. */
export function requestOf(model, messages, settings, variant) {
  return {
    model,
    messages,
    temperature: settings.temperature,
    top_p: settings.topP,
    ...(settings.maxTokens !== null && { max_tokens: settings.maxTokens }),
    ...(settings.seed !== null && { seed: settings.seed + variant }),
  };
}

/** Let `answer` grow until it is done, stopped or failed; `changed` is called whenever it did. */
export async function grow(answer, request, key, signal, changed) {
  const began = performance.now();
  let first = null;
  let last = null;
  try {
    for await (const chunk of streamChat(key, request, signal)) {
      answer.id = chunk.id;
      answer.model = chunk.system_fingerprint ?? chunk.model;
      answer.tokens = chunk.usage?.completion_tokens ?? answer.tokens;
      const [choice] = chunk.choices;
      if (choice?.delta?.content) {
        last = performance.now();
        first ??= last;
        answer.state = "streaming";
        answer.text += choice.delta.content;
      }
      answer.finish = choice?.finish_reason ?? answer.finish;
      changed();
    }
    answer.state = "done";
  } catch (error) {
    if (!signal.aborted && !(error instanceof ApiError)) throw error;
    answer.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) answer.problem = { kind: error.kind, message: error.message, until: Date.now() + 1000 * error.wait };
  }
  if (first !== null) {
    answer.first = (first - began) / 1000;
    // The first token comes after the prompt was read: the others tell the speed, unless they came at one stroke.
    answer.speed = last - first >= 10 && answer.tokens > 1 ? (answer.tokens - 1) / ((last - first) / 1000) : null;
  }
}
