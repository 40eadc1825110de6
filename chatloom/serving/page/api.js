/* The server's API: OpenAI's, and what it adds. */

/** What went wrong, as a `kind` that words.js has a sentence for, and the server's own `message`. */
export class ApiError extends Error {
  constructor(kind, message = "", wait = 0) {
    super(message);
    this.kind = kind;
    this.wait = wait; // seconds until another try makes sense
  }
}

const CODES = { context_length_exceeded: "long", model_not_found: "gone", rate_limit_exceeded: "rate", server_stopping: "loading" };
const KINDS = { 401: "key", 403: "key", 404: "gone", 429: "busy", 502: "offline", 503: "loading", 504: "offline" };

async function ask(path, { key, body, signal } = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("offline");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  throw errorOf(found?.error, response.status, waitOf(response.headers.get("Retry-After")));
}

function errorOf(error, status, wait) {
  const kind = CODES[error?.code] ?? KINDS[status] ?? (status >= 500 ? "failed" : "refused");
  return new ApiError(kind, typeof error?.message === "string" ? error.message : "", wait);
}

/** Seconds of a Retry-After, which may also be a date. */
function waitOf(header) {
  if (!header) return 0;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(Math.max(0, Math.ceil(seconds)), 3600) : 0;
}

/** The model that is served: `{id, version, lineage}`. */
export async function readModel(key) {
  const found = await (await ask("v1/models", { key })).json().catch(() => null);
  if (!found?.data?.length) throw new ApiError("failed");
  return found.data[0];
}

export async function sendFeedback(key, body) {
  return (await ask("v1/feedback", { key, body })).json();
}

/** Chunks of a chat completion as they come; it throws where the stream ends before the answer does. */
export async function* streamChat(key, body, signal) {
  const response = await ask("v1/chat/completions", { key, body: { ...body, stream: true, stream_options: { include_usage: true } }, signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(chunk.error, 500, 0);
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
  }
  throw new ApiError("broken");
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).replaceAll("\r\n", "\n").split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).replace(/^ /, ""));
      if (data.length) yield data.join("\n");
    }
  }
}
