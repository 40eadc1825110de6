/* Conversations and settings in this browser's storage, a key each, so that two tabs do not overwrite each other.
 *
 * conversation: { id, title, changed, turns }
 * turn:         { role: "user", text } or { role: "assistant", answers, shown }
 * answer:       { id, text, model, state, system, ... }, where state is one of waiting, streaming, done, stopped, failed
 */

const PREFIX = "chatloom/";
const CONVERSATION = `${PREFIX}conversation/`;
export const DEFAULTS = { temperature: 0.7, topP: 1, maxTokens: null, seed: null, system: "", key: "" };

/** Storage may be forbidden (private windows): then everything lives as long as the page. */
const memory = new Map();
const storage = (() => {
  try {
    localStorage.setItem(`${PREFIX}probe`, "");
    localStorage.removeItem(`${PREFIX}probe`);
    return localStorage;
  } catch {
    return {
      getItem: (key) => memory.get(key) ?? null,
      setItem: (key, value) => memory.set(key, value),
      removeItem: (key) => memory.delete(key),
      get length() { return memory.size; },
      key: (index) => [...memory.keys()][index],
    };
  }
})();

function read(key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null; // somebody else's, or cut: as if it were not there
  }
}

export const choice = (name) => storage.getItem(PREFIX + name);
export const choose = (name, value) => storage.setItem(PREFIX + name, value);

export const readSettings = () => ({ ...DEFAULTS, ...read(`${PREFIX}settings`) });
export const writeSettings = (settings) => storage.setItem(`${PREFIX}settings`, JSON.stringify(settings));

export const newConversation = () => ({ id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", changed: Date.now(), turns: [] });

/** All of them, the one that changed last first. */
export function readConversations() {
  const keys = Array.from({ length: storage.length }, (_, index) => storage.key(index)).filter((key) => key.startsWith(CONVERSATION));
  const found = keys.map(read).filter((conversation) => Array.isArray(conversation?.turns));
  for (const conversation of found) settle(conversation);
  return found.sort((one, other) => other.changed - one.changed);
}

/** An answer that was being written when the page was closed is one that was stopped. */
function settle(conversation) {
  for (const turn of conversation.turns)
    for (const answer of turn.answers ?? [])
      if (answer.state === "waiting" || answer.state === "streaming") answer.state = "stopped";
}

/** What is open on the page just now is not kept. */
const kept = (key, value) => (key === "editing" || key === "commenting" ? undefined : value);

/** False where the storage is full. */
export function writeConversation(conversation) {
  try {
    storage.setItem(CONVERSATION + conversation.id, JSON.stringify(conversation, kept));
    return true;
  } catch {
    return false;
  }
}

export const removeConversation = (id) => storage.removeItem(CONVERSATION + id);

/** Call `changed` when another tab adds, changes or deletes a conversation. */
export function watchConversations(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CONVERSATION)) changed();
  });
}
