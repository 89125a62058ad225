// Conversations: trees of messages, kept in this browser (IndexedDB) and mirrored in memory.

const WORDS = ["model", "system", "stop"];
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
export const SETTINGS = [...WORDS, ...NUMBERS];
const FORMAT = "gptjax-chat";

/** A name that no other has. `crypto.randomUUID` is missing where the page is served without TLS. */
const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36)).join("");

// --- Trees ---------------------------------------------------------------------------------------

/** `messages` are in the order of their making; `chosen` names, of each message that has several
 * successors, the one that is shown ("" for the first message, whose parent is null). */
export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings, messages: [], chosen: {} };
}

export function addMessage(conversation, parent, role, content) {
  const message = { id: newId(), parent, role, content, created: Date.now() };
  conversation.messages.push(message);
  conversation.chosen[parent ?? ""] = message.id;
  conversation.updated = message.created;
  return message;
}

/** Takes back a message that came to nothing; `shown` is the sibling that was chosen before it. */
export function removeMessage(conversation, message, shown) {
  conversation.messages = conversation.messages.filter((one) => one !== message);
  if (shown) conversation.chosen[message.parent] = shown;
  else delete conversation.chosen[message.parent];
}

export const siblings = (conversation, message) =>
  conversation.messages.filter((one) => one.parent === message.parent);

/** The messages that are shown, from the first to the end of the chosen branch or to `last`. */
export function pathOf(conversation, last = undefined) {
  const path = [];
  if (last !== undefined) {
    const byId = new Map(conversation.messages.map((message) => [message.id, message]));
    for (let id = last; id !== null; id = byId.get(id).parent) path.unshift(byId.get(id));
    return path;
  }
  const children = Map.groupBy(conversation.messages, (message) => message.parent);
  for (let parent = null, next; (next = children.get(parent)); parent = path.at(-1).id) {
    path.push(next.find(({ id }) => id === conversation.chosen[parent ?? ""]) ?? next.at(-1));
  }
  return path;
}

export function titleOf(conversation) {
  const first = conversation.messages[0]?.content.trim().replace(/\s+/g, " ") ?? "";
  return conversation.title || (first.length > 90 ? `${first.slice(0, 88)}…` : first) || "New chat";
}

// --- Storage -------------------------------------------------------------------------------------

const finished = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = request.oncomplete = () => resolve(request.result);
    request.onerror = request.onabort = () => reject(request.error ?? new Error("aborted"));
  });

export class Store {
  conversations = new Map();

  /** `onChange(id)` is called when another tab has changed a conversation that is not `busy(id)`, and
   * `onError(sentence)` when something cannot be kept; the page then goes on with its memory. */
  constructor({ onChange, busy, onError }) {
    Object.assign(this, { onChange, onError, database: null });
    this.tabs = new BroadcastChannel(FORMAT);
    this.tabs.onmessage = ({ data }) => busy(data) || this.#reread(data).catch(() => {});
  }

  async open() {
    try {
      const request = indexedDB.open(FORMAT, 1);
      request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
      this.database = await finished(request);
      for (const one of await finished(this.#table("readonly").getAll())) this.conversations.set(one.id, one);
    } catch (error) {
      this.onError(
        `This browser keeps nothing for this page (${error.name}): what you write is lost when it is closed. Export what you need.`,
      );
    }
  }

  newestFirst() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  async save(conversation) {
    this.conversations.set(conversation.id, conversation);
    await this.#write((table) => table.put(conversation), conversation.id);
  }

  async remove(id) {
    this.conversations.delete(id);
    await this.#write((table) => table.delete(id), id);
  }

  async #write(change, id) {
    if (!this.database) return;
    try {
      const table = this.#table("readwrite");
      change(table);
      await finished(table.transaction); // Only its end tells whether there was room.
      this.tabs.postMessage(id);
    } catch (error) {
      this.onError(
        error.name === "QuotaExceededError"
          ? "The browser's room for this page is full: the last changes are not kept. Export and delete some conversations."
          : `The last changes could not be kept (${error.name}). Export what you need.`,
      );
    }
  }

  async #reread(id) {
    const found = await finished(this.#table("readonly").get(id));
    if (found) this.conversations.set(id, found);
    else this.conversations.delete(id);
    this.onChange(id);
  }

  #table(mode) {
    return this.database.transaction("conversations", mode).objectStore("conversations");
  }
}

// --- Files ---------------------------------------------------------------------------------------

export const fileOf = (conversations) =>
  JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);

/** Reads a file that `fileOf` wrote, or throws an Error whose message is a sentence.
 *
 * Only known fields of the right type are taken over, and a parent has to stand before its
 * children, so what comes out is a tree. */
export function readFile(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (data?.format !== FORMAT || !Array.isArray(data.conversations)) {
    throw new Error("The file was not exported from this page.");
  }
  if (data.version !== 1) throw new Error("The file was written by a later version of this page.");
  return data.conversations.map((one, i) => {
    const check = (holds, what) => {
      if (!holds) throw new Error(`Conversation ${i + 1} of the file ${what}.`);
    };
    const isTime = (value) => Number.isFinite(value) && Math.abs(value) < 8e15;
    check(one && typeof one.id === "string" && one.id, "has no id");
    check(typeof one.title === "string", "has no title");
    check(isTime(one.created) && isTime(one.updated), "has no dates");
    check(Array.isArray(one.messages), "has no messages");
    const roles = new Map([[null, null]]);
    const messages = one.messages.map((message, j) => {
      const { id, parent, role, content, created } = message ?? {};
      check(typeof id === "string" && id && !roles.has(id), `has no good id at message ${j + 1}`);
      check(roles.has(parent), `has a message ${j + 1} that follows none`);
      const roleFits = role === "user" || (role === "assistant" && roles.get(parent) === "user");
      check(roleFits, `has a wrong role at message ${j + 1}`);
      check(typeof content === "string" && isTime(created), `has no text or date at message ${j + 1}`);
      roles.set(id, role);
      const kept = { id, parent, role, content, created };
      if (typeof message.finish === "string") kept.finish = message.finish;
      if (typeof message.model === "string") kept.model = message.model;
      for (const name of ["tokens", "first", "seconds"]) {
        if (Number.isFinite(message[name])) kept[name] = message[name];
      }
      if (message.counted === true) kept.counted = true;
      return kept;
    });
    const settings = {};
    for (const name of SETTINGS) {
      const value = one.settings?.[name];
      if (WORDS.includes(name) ? typeof value === "string" : Number.isFinite(value)) settings[name] = value;
    }
    const chosen = {};
    for (const [parent, id] of Object.entries(one.chosen ?? {})) {
      if (roles.has(parent || null) && roles.has(id)) chosen[parent] = id;
    }
    const { id, title, created, updated } = one;
    return { id, title, created, updated, settings, messages, chosen };
  });
}

/** The conversations of a file that are not there yet. One that is there in another state gets a new
 * id, so that neither is lost. */
export function toAdd(read, conversations) {
  const same = (a, b) => JSON.stringify(readFile(fileOf([a]))) === JSON.stringify(readFile(fileOf([b])));
  return read
    .filter((one) => !conversations.has(one.id) || !same(one, conversations.get(one.id)))
    .map((one) => (conversations.has(one.id) ? { ...one, id: newId() } : one));
}
