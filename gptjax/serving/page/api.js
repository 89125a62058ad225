// The OpenAI-compatible API that is served beside this page.

import { remembered } from "./shell.js";

/** What the server, or the way to it, has refused. `message` is a sentence for a person. */
export class Refusal extends Error {
  constructor(message, status = 0, wait = null) {
    super(message);
    Object.assign(this, { status, wait }); // `wait`: seconds that the server asks to wait.
  }
}

async function call(path, options = {}) {
  const key = remembered("key", undefined, "sessionStorage");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. It may have stopped, or still be loading its model.");
  }
  if (!response.ok) throw await refusalOf(response);
  return response;
}

async function refusalOf(response) {
  const { status } = response;
  const said = (await response.json().catch(() => null))?.error?.message;
  if (status === 429 || status === 503) {
    const after = response.headers.get("Retry-After") ?? "";
    const seconds = /^\d+$/.test(after) ? Number(after) : (Date.parse(after) - Date.now()) / 1000;
    const wait = Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
    const busy = `${said ? `The server is busy: ${said}` : "The server is busy"}`.replace(/\.?$/, ".");
    return new Refusal(wait ? `${busy} It asks to wait ${wait} s.` : busy, status, wait);
  }
  return new Refusal(
    said ? `The server refused: ${said}` : `The server answered with status ${status}.`,
    status,
  );
}

/** Names of the models that are served. */
export async function models() {
  const answer = await (await call("v1/models")).json().catch(() => null);
  if (!Array.isArray(answer?.data)) throw new Refusal("What answers at v1/models is not a model server.");
  return answer.data.map(({ id }) => String(id));
}

/** The `data:` lines of a stream of server-sent events; the API writes one line an event. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // Keeps half a character until its other half comes.
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (done ? "\n" : decoder.decode(value, { stream: true }))).split(/\r\n|\r|\n/);
      rest = lines.pop(); // Half a line: its other half comes later.
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Asks for an answer and yields its parts: {text}, {finish}, {usage}. Throws a Refusal where the
 * answer was not brought to its end. */
export async function* complete(messages, settings, signal) {
  const { model, temperature, top_p, max_tokens, seed } = settings;
  const stop = settings.stop?.split("\n").filter(Boolean) ?? [];
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = {
    ...{ model, temperature, top_p, max_tokens, seed }, // Those that are undefined are not sent.
    ...(stop.length ? { stop } : {}),
    messages: [...system, ...messages.map(({ role, content }) => ({ role, content }))],
    stream: true,
    stream_options: { include_usage: true },
  };
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(`The server stopped: ${chunk.error.message}`, 500);
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) yield { finish: choice.finish_reason };
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Refusal) throw error;
    if (error.name === "SyntaxError")
      throw new Refusal("What the server sends is not in the format of the API.");
    throw new Refusal("The connection was lost before the answer's end.");
  }
  throw new Refusal("The connection was lost before the answer's end.");
}
