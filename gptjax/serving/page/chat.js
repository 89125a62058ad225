// The page: what it shows, and what its buttons and keys do.

import { complete, models, Refusal } from "./api.js";
import { languageOf, make, MarkdownView } from "./markdown.js";
import {
  $,
  askKey,
  button,
  closeDrawers,
  copy,
  download,
  drawer,
  fit,
  icon,
  phone,
  remembered,
  toast,
  touch,
} from "./shell.js";
import * as store from "./store.js";

const PROMPTS = [
  ["Explain", " attention to someone who knows only matrix products."],
  ["Write", " a Python function that merges two sorted lists, with a test."],
  ["Compare", " AdamW, Lion and Muon in a table."],
  ["用三句话", "说明什么是困惑度。"],
];
const KEYS = [
  ["Enter", "Send"],
  ["Shift + Enter", "New line"],
  ["Escape", "Stop the answer"],
  ["↑ in an empty box", "Edit the last message"],
  ["Ctrl or ⌘ + Shift + O", "New chat"],
  ["Ctrl or ⌘ + K", "Search conversations"],
  ["? or Ctrl + /", "This list"],
];
const ENDS = {
  stop: "",
  stopped: "Stopped",
  length: "Cut at the limit of tokens",
  content_filter: "Held back by a filter",
  lost: "Interrupted",
};

const runs = new Map(); // Answers that are being written, by the id of their conversation,
const failures = new Map(); // and what went wrong with the last: {text, until}.
const views = new Map(); // By the id of a message: the elements of what is shown now.
let served = []; // Names of models.
let current = store.newConversation();
let editing = null; // The id of the message that is being edited.
let pinned = true; // Whether the end of the conversation stays in sight as it grows.

const kept = new store.Store({
  busy: (id) => runs.has(id),
  onChange(id) {
    if (id !== current.id) return showList();
    if (!kept.conversations.has(id)) return open(store.newConversation());
    current = kept.conversations.get(id);
    if (!editing) show();
    showSettings();
  },
  onError: (sentence) => toast(sentence, null, 15000),
});

// --- The list of conversations -------------------------------------------------------------------

function showList() {
  if ($("conversations").querySelector("input")) return; // A title is being written.
  const wanted = $("search").value.trim().toLowerCase();
  const hit = (text) => text.toLowerCase().includes(wanted);
  const today = new Date().setHours(0, 0, 0, 0);
  const groups = new Map();
  for (const one of kept.newestFirst()) {
    if (wanted && !hit(store.titleOf(one)) && !one.messages.some(({ content }) => hit(content))) continue;
    const days = Math.ceil((today - one.updated) / 864e5);
    const group = days <= 0 ? "Today" : days === 1 ? "Yesterday" : days <= 7 ? "Last seven days" : "Earlier";
    groups.set(group, [...(groups.get(group) ?? []), listItem(one)]);
  }
  $("conversations").replaceChildren(
    ...[...groups].flatMap(([name, items]) => [make("li", { class: "group" }, name), ...items]),
  );
  if (wanted && !groups.size) $("conversations").append(make("li", { class: "group" }, "Nothing found"));
}

function listItem(conversation) {
  const title = store.titleOf(conversation);
  const name = make("button", { type: "button", class: "name", title, lang: languageOf(title) }, title);
  if (conversation.id === current.id) name.setAttribute("aria-current", "page");
  name.onclick = () => {
    open(conversation);
    closeDrawers();
  };
  const item = make(
    "li",
    { class: runs.has(conversation.id) ? "busy" : null },
    name,
    button("edit", `Rename ${title}`, () => rename(conversation, item)),
    button("export", `Export ${title}`, () => download("conversation.json", store.fileOf([conversation]))),
    button("delete", `Delete ${title}`, () => remove(conversation)),
  );
  return item;
}

function rename(conversation, item) {
  const field = make("input", { "aria-label": "Title", maxlength: 200 });
  field.value = store.titleOf(conversation);
  item.replaceChildren(field);
  field.select();
  const end = (keep) => {
    field.onblur = null; // Taking it away blurs it once more.
    field.remove();
    if (keep && field.value.trim() !== store.titleOf(conversation)) {
      conversation.title = field.value.trim();
      kept.save(conversation);
    }
    show();
  };
  field.onblur = () => end(true);
  field.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Escape") end(false);
    if (event.key === "Enter" && !composing(event)) end(true);
  };
}

function remove(conversation) {
  runs.get(conversation.id)?.controller.abort();
  kept.remove(conversation.id);
  if (conversation === current) open(store.newConversation());
  else showList();
  toast(`Deleted “${store.titleOf(conversation)}”.`, () => {
    kept.save(conversation);
    open(conversation);
  });
}

async function importFile(file) {
  try {
    const read = store.readFile(await file.text());
    const added = store.toAdd(read, kept.conversations);
    for (const one of added) await kept.save(one);
    showList();
    const known = read.length - added.length;
    toast(`Imported ${added.length} of ${read.length}${known ? `; ${known} were here already` : ""}.`);
  } catch (error) {
    toast(`Nothing was imported. ${error.message}`, null, 15000);
  }
}

// --- The conversation ----------------------------------------------------------------------------

function open(conversation) {
  current = conversation;
  editing = null;
  pinned = true;
  show();
  showSettings();
  $("scroll").scrollTop = $("scroll").scrollHeight;
  if (!touch.matches) $("box").focus();
}

/** Shows everything but the settings anew. */
function show() {
  showList();
  const path = store.pathOf(current);
  const title = path.length ? store.titleOf(current) : "";
  $("title").textContent = title;
  document.title = title ? `${title} · gptjax` : "gptjax";
  $("empty").hidden = path.length > 0;
  views.clear();
  $("messages").replaceChildren(...path.map(messageItem));
  showState();
}

function messageItem(message) {
  const body = make("div", { class: "body", lang: languageOf(message.content) });
  const under = make("div", { class: "under" });
  const who = make("h2", { class: "unseen" }, message.role === "user" ? "You" : "Answer");
  const item = make("li", { class: `message ${message.role}`, "data-id": message.id }, who, body, under);
  if (editing === message.id) {
    item.classList.add("editing");
    body.append(editor(message));
    return item;
  }
  if (message.role === "user") body.textContent = message.content;
  const view = { item, body, under, markdown: message.role === "user" ? null : new MarkdownView(body) };
  views.set(message.id, view);
  showMessage(message);
  return item;
}

/** Brings what is shown of an answer up to date, and what stands under any message. */
function showMessage(message) {
  const view = views.get(message.id);
  if (!view) return;
  const running = runs.get(current.id)?.message === message;
  view.markdown?.update(message.content);
  const language = languageOf(message.content);
  if (language) view.body.lang = language;
  view.item.classList.toggle("running", running);
  view.item.setAttribute("aria-busy", running);
  if (running && view.under.childElementCount === 0) return;
  view.under.replaceChildren(...(running ? [] : tools(message)));
}

function tools(message) {
  const found = [];
  const stuck = runs.has(current.id) ? "" : null; // While an answer is written, the branch stays.
  const all = store.siblings(current, message);
  const at = all.indexOf(message);
  if (all.length > 1) {
    const step = (by) => {
      current.chosen[message.parent ?? ""] = all[at + by].id;
      kept.save(current);
      pinned = false; // The arrows stay under the pointer.
      show();
      views
        .get(all[at + by].id)
        ?.under.querySelector(by < 0 ? ".back" : ".forth")
        ?.focus();
    };
    found.push(
      make(
        "span",
        { class: "branches" },
        button("left", "Previous version", () => step(-1), {
          class: "icon back",
          disabled: at === 0 ? "" : stuck,
        }),
        `${at + 1} / ${all.length}`,
        button("right", "Next version", () => step(1), {
          class: "icon forth",
          disabled: at === all.length - 1 ? "" : stuck,
        }),
      ),
    );
  }
  const copying = button("copy", "Copy", async () => {
    await copy(message.content);
    copying.replaceChildren("Copied");
    setTimeout(() => copying.replaceChildren(icon("copy")), 1500);
  });
  found.push(copying);
  const off = { disabled: stuck };
  if (message.role === "user") return [...found, button("edit", "Edit", () => edit(message), off)];
  const again = button("again", "Another answer", () => generate(current, message.parent), off);
  return [...found, again, make("span", { class: "figures" }, figures(message))];
}

function figures({ finish = "lost", model, tokens, counted, first, seconds }) {
  const parts = [finish in ENDS ? ENDS[finish] : finish];
  if (served.length > 1) parts.push(model);
  if (seconds > 0 && tokens > 1)
    parts.push(`${counted ? "" : "about "}${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (first !== undefined)
    parts.push(`first token after ${first < 10 ? first.toFixed(2) : first.toFixed(0)} s`);
  if (tokens) parts.push(`${counted ? "" : "about "}${tokens} token${tokens === 1 ? "" : "s"}`);
  return parts.filter(Boolean).join(" · ");
}

/** Shows what depends on whether an answer is being written, or failed. */
function showState() {
  const running = runs.has(current.id);
  const last = store.pathOf(current).at(-1);
  const failure = failures.get(current.id) ?? failures.get("server");
  $("send").hidden = running;
  $("stop").hidden = !running;
  // A question without an answer can be asked again, after a reload too.
  const unanswered = last?.role === "user" && !editing ? "This has no answer yet." : "";
  $("failure").hidden = running || !(failure || unanswered);
  $("failure").classList.toggle("mild", !failure);
  const [words, again] = $("failure").children;
  const text = failure?.text ?? unanswered;
  if (words.textContent !== text) words.textContent = text; // An alert: said once, not every second.
  const left = Math.ceil(((failure?.until ?? 0) - Date.now()) / 1000);
  again.textContent = left > 0 ? `Try again (${left} s)` : "Try again";
  clearTimeout(showState.timer);
  if (left > 0) showState.timer = setTimeout(showState, 1000);
}

$("failure").lastElementChild.onclick = async () => {
  const last = store.pathOf(current).at(-1);
  const failed = failures.has(current.id);
  if (failures.has("server")) await loadModels();
  if (last?.role === "user") generate(current, last.id);
  else if (failed && last) generate(current, last.parent);
};

function edit(message) {
  if (runs.has(current.id)) return;
  editing = message.id;
  pinned = false;
  show();
  const area = $("messages").querySelector(".editing textarea");
  fit(area);
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function editor(message) {
  const area = make("textarea", { "aria-label": "Edit the message", rows: 1 });
  area.value = message.content;
  const end = (send) => {
    editing = null;
    if (send && area.value.trim()) say(area.value, message.parent);
    else show();
    $("box").focus();
  };
  area.oninput = () => fit(area);
  area.onkeydown = (event) => {
    if (sends(event)) end(true);
    if (event.key === "Escape") end(false);
    if (sends(event) || event.key === "Escape") event.preventDefault();
  };
  return make(
    "div",
    { class: "editor" },
    area,
    make(
      "p",
      { class: "row" },
      make("button", { type: "button", class: "wide", onclick: () => end(false) }, "Cancel"),
      make("button", { type: "button", class: "wide primary", onclick: () => end(true) }, "Send"),
    ),
  );
}

const failureOf = ({ message, wait }) => ({ text: message, until: wait ? Date.now() + wait * 1000 : 0 });

function say(text, parent) {
  if (runs.has(current.id)) return;
  const message = store.addMessage(current, parent, "user", text.trim());
  pinned = true;
  generate(current, message.id);
}

/** Writes an answer to the user's message `parent`, beside those that it has. */
async function generate(conversation, parent) {
  if (runs.has(conversation.id)) return;
  failures.delete(conversation.id);
  if (conversation === current) editing = null;
  kept.save(conversation); // The question; the answer follows when there is something of it.
  const path = store.pathOf(conversation, parent);
  const shown = conversation.chosen[parent];
  const message = store.addMessage(conversation, parent, "assistant", "");
  Object.assign(message, { finish: "lost", tokens: 0 }); // So it stays if the page is closed now.
  const save = () =>
    message.content && kept.conversations.get(conversation.id) === conversation && kept.save(conversation);
  const run = { controller: new AbortController(), message, save };
  runs.set(conversation.id, run);
  if (conversation === current) show();

  const saving = setInterval(save, 2000);
  let frame = 0; // One rendering a frame, however fast the parts come.
  const showSoon = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      showMessage(message);
    });
  };
  const start = performance.now();
  let failure = null;
  let refused = false;
  try {
    if (!served.length) served = await models();
    const settings = { ...conversation.settings };
    message.model = settings.model ||= served[0];
    for await (const { text, finish, usage } of complete(path, settings, run.controller.signal)) {
      if (text) {
        const now = (performance.now() - start) / 1000;
        message.first ??= now;
        message.seconds = now - message.first;
        message.content += text;
        message.tokens += 1; // An estimate, until the server says how many there were.
        showSoon();
      }
      if (finish) message.finish = finish;
      if (usage) Object.assign(message, { tokens: usage.completion_tokens, counted: true });
    }
  } catch (error) {
    if (run.controller.signal.aborted) message.finish = "stopped";
    else {
      if (!(error instanceof Refusal)) console.error(error);
      message.finish = "lost";
      failure = failureOf(error);
      refused = error.status === 401;
    }
  }
  clearInterval(saving);
  cancelAnimationFrame(frame);
  runs.delete(conversation.id);
  if (failure) failures.set(conversation.id, failure);
  else failures.delete("server");
  const empty = !message.content && ["lost", "stopped"].includes(message.finish);
  if (empty) store.removeMessage(conversation, message, shown);
  if (kept.conversations.get(conversation.id) === conversation) kept.save(conversation); // Not if deleted meanwhile.
  if (conversation !== current) return showList();

  if (empty) show();
  else {
    for (const one of store.pathOf(conversation)) showMessage(one); // Their buttons work again.
    showList();
    showState();
  }
  $("live").textContent = failure ? "" : `The answer has ended. ${figures(message)}`;
  if (refused && (await askKey())) {
    await loadModels();
    generate(conversation, parent);
  }
}

// --- Settings ------------------------------------------------------------------------------------

function showSettings() {
  const { model } = current.settings;
  const names = model && !served.includes(model) ? [model, ...served] : served;
  const label = (name) => (served.includes(name) ? name : `${name} (not served now)`);
  const fields = $("settings").elements;
  fields.model.replaceChildren(...names.map((name) => make("option", { value: name }, label(name))));
  for (const name of store.SETTINGS)
    fields[name].value = current.settings[name] ?? (name === "model" ? (names[0] ?? "") : "");
  $("model-name").textContent = fields.model.value || "Settings";
  $("panel-open").setAttribute("aria-label", `Settings, model ${fields.model.value || "unknown"}`);
  checkSettings();
}

function checkSettings() {
  const wrong = [...$("settings").elements].find((field) => !field.validity.valid);
  for (const field of $("settings").elements) field.setAttribute("aria-invalid", !field.validity.valid);
  $("invalid").textContent = wrong
    ? `${wrong.labels[0].firstChild.textContent.trim()}: ${wrong.validationMessage} The last good value is used.`
    : "";
}

$("settings").oninput = ({ target }) => {
  checkSettings();
  if (!target.validity.valid) return;
  const value = target.type === "number" ? target.valueAsNumber : target.value;
  if (target.value === "") delete current.settings[target.name];
  else current.settings[target.name] = value;
  if (target.name === "model") showSettings();
  if (current.messages.length) kept.save(current);
};

async function loadModels() {
  try {
    served = await models();
    failures.delete("server");
  } catch (error) {
    if (error.status === 401 && (await askKey())) return loadModels();
    failures.set("server", failureOf(error));
  }
  showSettings();
  showState();
}

// --- Keys and buttons ----------------------------------------------------------------------------

/** Whether a key belongs to an input method. Safari ends a composition before its Enter, which it
 * marks by the code alone. */
const composing = (event) => event.isComposing || event.keyCode === 229;
/** Enter writes a new line on a phone, whose keyboard has no other way to. */
const sends = (event) => event.key === "Enter" && !event.shiftKey && !composing(event) && !touch.matches;

function send() {
  const text = $("box").value;
  if (!text.trim() || runs.has(current.id)) return;
  $("box").value = "";
  fit($("box"));
  say(text, store.pathOf(current).at(-1)?.id ?? null);
}

function newChat() {
  open(store.newConversation({ ...(current.settings.model ? { model: current.settings.model } : {}) }));
  closeDrawers();
  $("box").focus();
}

const stop = () => runs.get(current.id)?.controller.abort();
const showKeys = () => $("keys").open || $("keys").showModal();

$("box").oninput = () => fit($("box"));
$("box").onkeydown = (event) => {
  if (sends(event)) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("box").value && !composing(event)) {
    const last = store.pathOf(current).findLast(({ role }) => role === "user");
    if (last) {
      event.preventDefault();
      edit(last);
    }
  }
};

document.addEventListener("keydown", (event) => {
  if (composing(event) || document.querySelector("dialog[open]") || event.defaultPrevented) return;
  const command = event.ctrlKey || event.metaKey;
  const inText = event.target.matches?.("input, textarea, select");
  const act = (action) => {
    event.preventDefault();
    action();
  };
  if (event.key === "Escape") {
    if (closeDrawers()) event.preventDefault();
    else if (runs.has(current.id)) act(stop);
  } else if (command && event.shiftKey && event.key.toLowerCase() === "o") act(newChat);
  else if (command && event.key.toLowerCase() === "k") {
    act(() => {
      drawer("side", true);
      $("search").select();
    });
  } else if ((command && event.key === "/") || (event.key === "?" && !inText)) act(showKeys);
});

// All forms of the page are handled here: none is ever sent as a form.
document.addEventListener("submit", (event) => {
  event.preventDefault();
  if (event.target.id === "composer") send();
  else event.target.closest("dialog")?.close("given");
});
$("ask-key").querySelector("[value=cancel]").onclick = () => $("ask-key").close("");

$("new").onclick = newChat;
$("stop").onclick = stop;
$("search").oninput = showList;
$("show-keys").onclick = showKeys;
$("export-all").onclick = () => download("conversations.json", store.fileOf(kept.newestFirst()));
$("import").onclick = () => $("file").click();
$("file").onchange = async ({ target }) => {
  for (const file of target.files) await importFile(file);
  target.value = ""; // The same file can be chosen again.
};
$("messages").onclick = async ({ target }) => {
  if (!target.matches(".copy-code")) return;
  await copy(target.closest(".code").querySelector("code").textContent);
  target.textContent = "Copied";
  setTimeout(() => (target.textContent = "Copy"), 1500);
};

// --- Following the end ---------------------------------------------------------------------------

const scroller = $("scroll");
const toEnd = () => (scroller.scrollTop = scroller.scrollHeight);
scroller.onscroll = () => {
  pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  $("to-end").hidden = pinned;
};
$("to-end").onclick = () => {
  pinned = true;
  toEnd();
};
// Called before the paint, so that a growing answer is never seen a line too low.
const grown = new ResizeObserver(() => (pinned ? toEnd() : scroller.onscroll()));
for (const part of [scroller, $("messages"), $("failure")]) grown.observe(part);

// --- Start ---------------------------------------------------------------------------------------

$("keys")
  .querySelector("dl")
  .append(
    ...KEYS.map(([keys, what]) =>
      make("div", {}, make("dt", {}, what), make("dd", {}, make("kbd", {}, keys))),
    ),
  );
$("prompts").append(
  ...PROMPTS.map(([start, rest]) =>
    make(
      "button",
      { type: "button", lang: languageOf(rest), onclick: () => say(start + rest, null) },
      make("b", {}, start),
      rest,
    ),
  ),
);
await kept.open();
const before = kept.conversations.get(remembered("open", undefined, "sessionStorage"));
open(before ?? current);
addEventListener("pagehide", () => {
  remembered("open", current.id, "sessionStorage"); // A reload comes back to where one was.
  for (const run of runs.values()) run.save();
});
loadModels();
