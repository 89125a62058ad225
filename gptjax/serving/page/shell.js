// The parts of the page that know nothing of conversations: icons, messages, sides, themes.

import { make } from "./markdown.js";

export const $ = (id) => document.getElementById(id);
export const phone = matchMedia("(max-width: 56rem)");
export const touch = matchMedia("(pointer: coarse)");

/** Reads a value that this browser keeps, or writes it first; null where storage is switched off. */
export function remembered(name, value, storage = "localStorage") {
  try {
    if (value !== undefined) window[storage].setItem(`gptjax:${name}`, value);
    return window[storage].getItem(`gptjax:${name}`);
  } catch {
    return value ?? null;
  }
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export const button = (name, label, onclick, attributes = {}) =>
  make(
    "button",
    { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...attributes },
    icon(name),
  );

let toastTimer;
export function toast(text, undo = null, time = 8000) {
  const [words, action] = $("toast").children;
  words.textContent = text;
  action.hidden = !undo;
  action.onclick = () => {
    $("toast").hidden = true;
    undo();
  };
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), time);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS there is no clipboard but by way of a selection.
    const area = make("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

let asking = null;

/** Asks for the server's key, once at a time, and keeps it for this tab; resolves to whether one was given. */
export function askKey() {
  const dialog = $("ask-key");
  const field = dialog.querySelector("input");
  asking ??= new Promise((resolve) => {
    $("wrong-key").hidden = !remembered("key", undefined, "sessionStorage");
    dialog.showModal();
    dialog.onclose = () => {
      const given = dialog.returnValue === "given";
      if (given) remembered("key", field.value.trim(), "sessionStorage");
      field.value = dialog.returnValue = "";
      asking = null;
      resolve(given);
    };
  });
  return asking;
}

/** Grows a text area with its text; the style sheet bounds it. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

// --- Sides and themes ----------------------------------------------------------------------------

export const isOpen = (name) => document.body.classList.contains(`${name}-opened`);

/** Opens or closes a side. On a phone it lies over the conversation, and there is one at a time. */
export function drawer(name, opened) {
  if (opened && phone.matches) drawer(name === "side" ? "panel" : "side", false);
  document.body.classList.toggle(`${name}-opened`, opened);
  $(name).inert = !opened;
  $(`${name}-open`).setAttribute("aria-expanded", opened);
  document.querySelector("main").inert = phone.matches && (isOpen("side") || isOpen("panel"));
}

/** Closes what lies over the conversation on a phone; whether there was something. */
export function closeDrawers() {
  const closed = phone.matches ? ["side", "panel"].filter(isOpen) : [];
  for (const name of closed) {
    drawer(name, false);
    $(`${name}-open`).focus();
  }
  return closed.length > 0;
}

for (const name of ["side", "panel"]) {
  $(`${name}-open`).onclick = () => {
    drawer(name, !isOpen(name));
    if (phone.matches) $(`${name}-close`).focus();
  };
  $(`${name}-close`).onclick = () => {
    drawer(name, false);
    $(`${name}-open`).focus();
  };
}
$("backdrop").onclick = closeDrawers;
phone.onchange = () => {
  drawer("panel", false);
  drawer("side", !phone.matches);
};
phone.onchange();

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").title = `Theme: ${THEMES[theme]}`;
  $("theme").setAttribute("aria-label", $("theme").title);
}

$("theme").onclick = () => {
  const names = Object.keys(THEMES);
  const after = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  remembered("theme", after);
  setTheme(after);
};
setTheme(remembered("theme") in THEMES ? remembered("theme") : "auto");
