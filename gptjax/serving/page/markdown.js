// Markdown, written as DOM nodes while it arrives.
//
// Safe by construction: every node is made by `createElement` or is text, and no attribute comes
// from the text but the address of a link, whose scheme is checked. HTML is shown as it is written.

const SCHEMES = ["http:", "https:", "mailto:"];
const DEEPEST = 12; // Quotes in lists in quotes: beyond this they are text, so the stack stays small.

/** Makes an element; `attributes` are attributes, but for `on...`, which are listeners. */
export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** The language that the script of a text suggests; the glyphs of Han characters depend on it. */
export function languageOf(text) {
  if (/[\u3040-\u30ff]/.test(text)) return "ja";
  if (/[\uac00-\ud7af]/.test(text)) return "ko";
  return /[\u3400-\u9fff]/.test(text) ? "zh-Hans" : null;
}

function link(address, label) {
  let url;
  try {
    url = new URL(address); // Absolute addresses only; it also undoes "java\nscript:".
  } catch {
    return null;
  }
  if (!SCHEMES.includes(url.protocol)) return null;
  return make("a", { href: url.href, rel: "noopener noreferrer", target: "_blank" }, ...label);
}

// --- Spans ---------------------------------------------------------------------------------------

const SPECIAL = /[\\`*_~[!<$\n]|https?:\/\//g;
const MATH = /\$\$[^$]+\$\$|\$(?!\s)[^$\n]*[^$\s\\]\$(?!\d)/y; // `$5 and $6` is none.
const LINK =
  /!?\[((?:[^[\]\\]|\\.|\[[^[\]]*\])*)\]\(\s*<?((?:[^\s()\\<>]|\\.|\([^\s()]*\))+)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BARE = /https?:\/\/[^\s<>"'`\u3000-\u303f\uff00-\uffef]+/y;
const WORD = /[\p{L}\p{N}]/u;

function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** What begins at `at`: [its length, a node or text], or null where it means nothing. */
function spanAt(text, at, depth, absent) {
  const char = text[at];
  let found;
  // LaTeX stays the text that it is: no emphasis in it, no escapes.
  const math = (formula) => [formula.length, make("span", { class: "math" }, formula)];
  if (char === "$") return (found = matchAt(MATH, text, at)) && math(found[0]);
  if (char === "\\") {
    const close = { "(": "\\)", "[": "\\]" }[text[at + 1]];
    const end = close && !absent.has(close) ? text.indexOf(close, at + 2) : -1;
    if (end >= 0) return math(text.slice(at, end + 2));
    if (close) absent.add(close);
    if (text[at + 1] === "\n") return [2, make("br")];
    return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? [2, text[at + 1]] : null;
  }
  if (char === "\n") return [1, make("br")];
  if (char === "`") return codeSpan(text, at, absent);
  if (char === "<") {
    found = matchAt(ANGLED, text, at);
    const node = found && link(found[1], [found[1]]);
    return node && [found[0].length, node];
  }
  if (char === "h") {
    if (WORD.test(text[at - 1] ?? "")) return null;
    let address = matchAt(BARE, text, at)?.[0].replace(/[.,;:!?*_~]+$/, "");
    if (address?.endsWith(")") && !address.includes("(")) address = address.replace(/\)+$/, "");
    const node = address && link(address, [address]);
    return node && [address.length, node];
  }
  if (char === "[" || char === "!") {
    found = matchAt(LINK, text, at);
    // No picture is ever fetched: its description is a link to it.
    const node = found && link(found[2], spans(found[1] || found[2], depth + 1));
    return node && [found[0].length, node];
  }
  return emphasis(text, at, depth, absent);
}

function codeSpan(text, at, absent) {
  const ticks = /`+/y;
  const run = matchAt(ticks, text, at)[0].length;
  if (!absent.has(run)) {
    const closing = new RegExp(`(?<!\`)\`{${run}}(?!\`)`, "g");
    const end = matchAt(closing, text, at + run)?.index;
    if (end !== undefined) {
      const code = text
        .slice(at + run, end)
        .replaceAll("\n", " ")
        .replace(/^ (.*\S.*) $/, "$1");
      return [end + run - at, make("code", {}, code)];
    }
    absent.add(run);
  }
  return [run, text.slice(at, at + run)];
}

/** `*a*`, `**a**`, `***a***`, the same with `_`, and `~~a~~`.
 *
 * What closes is what follows no space, whichever letter or sign comes next: so
 * `**注意：**后面` is bold, which the flanking rules of CommonMark do not grant.
 */
function emphasis(text, at, depth, absent) {
  const mark = text[at];
  let run = 1;
  while (text[at + run] === mark) run += 1;
  const literal = [run, text.slice(at, at + run)];
  const inside = at + run;
  if (run > 3 || (mark === "~" && run !== 2) || !/\S/.test(text[inside] ?? " ")) return literal;
  if (mark === "_" && WORD.test(text[at - 1] ?? "")) return literal;

  // Runs that could close, in order, leaving out those in code or behind a backslash.
  const runs = new RegExp(`\\\\[^]|\`[^\`]*\`|\\${mark}+`, "g");
  const closes = (found) =>
    found[0][0] === mark &&
    /\S/.test(text[found.index - 1]) &&
    !(mark === "_" && WORD.test(text[found.index + found[0].length] ?? ""));
  const find = (wanted) => {
    const name = `${mark}${wanted}`; // Looked for in vain once is enough: time stays linear.
    if (absent.has(name)) return null;
    runs.lastIndex = inside;
    for (let found; (found = runs.exec(text));) {
      const length = found[0].length;
      // A pair in single marks is a bold part of it, so it does not close them.
      const fits = wanted === 1 && mark !== "~" ? length !== 2 : length >= wanted;
      if (closes(found) && fits) return found.index + length - wanted;
    }
    absent.add(name);
    return null;
  };

  let wanted = run;
  let end = find(run);
  for (wanted of run === 3 && end === null ? [1, 2] : []) if ((end = find(wanted)) !== null) break;
  if (end === null || end < inside) return literal;
  let children = spans(text.slice(at + wanted, end), depth + 1);
  // Han characters have no italics: the style sheet marks them in another way.
  const lang = languageOf(text.slice(at, end));
  if (wanted === 3) children = [make("em", { lang }, ...children)];
  const tag = mark === "~" ? "del" : wanted === 1 ? "em" : "strong";
  return [end + wanted - at, make(tag, wanted === 1 ? { lang } : {}, ...children)];
}

/** Nodes and strings for the text of a paragraph, a cell, a heading. */
function spans(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  const absent = new Set();
  let plain = "";
  let at = 0;
  for (let found; (found = matchAt(SPECIAL, text, at));) {
    plain += text.slice(at, found.index);
    at = found.index;
    const [length, node] = spanAt(text, at, depth, absent) ?? [1, text[at]];
    if (typeof node === "string") plain += node;
    else {
      nodes.push(plain, node);
      plain = "";
    }
    at += length;
  }
  return [...nodes, plain + text.slice(at)].filter((node) => node !== "");
}

// --- Blocks --------------------------------------------------------------------------------------

const FENCE = /^\s*(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:(\s+)(.*)|)$/;
const DELIMITERS = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MATH_FENCE = { $$: "$$", "\\[": "\\]" };

const indentOf = (line) => line.length - line.trimStart().length;
const startsTable = (lines, at) =>
  lines[at].includes("|") &&
  DELIMITERS.test(lines[at + 1] ?? "") &&
  lines[at + 1].includes("|") &&
  cells(lines[at]).length === cells(lines[at + 1]).length;

/** Whether a line ends the paragraph above it. Of ordered lists, as in CommonMark, only a first item. */
function interrupts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return (
    !line.trim() ||
    [FENCE, HEADING, RULE, QUOTE].some((pattern) => pattern.test(line)) ||
    (item?.[4] && !/^\d+[.)]$/.test(item[2].replace(/^1[.)]$/, ""))) ||
    startsTable(lines, at)
  );
}

/** Blocks of lines, each with the number of its first line; one node a block. */
function blocks(lines, depth = 0) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) at += 1;
    else {
      const [end, node] = depth > DEEPEST ? [lines.length, plain(lines, at)] : block(lines, at, depth);
      found.push({ line: at, node });
      at = end;
    }
  }
  return found;
}

const plain = (lines, at) => make("p", {}, lines.slice(at).join("\n"));
const nodesOf = (lines, depth) => blocks(lines, depth + 1).map(({ node }) => node);

/** The block that begins at a line: [the line after its last, its node]. */
function block(lines, at, depth) {
  const line = lines[at];
  let found;
  if ((found = FENCE.exec(line))) return fence(lines, at, found[1], found[2]);
  if ((found = HEADING.exec(line))) {
    // The page has its own first and second level.
    return [at + 1, make(`h${Math.min(6, found[1].length + 2)}`, {}, ...spans(found[2] ?? ""))];
  }
  if (RULE.test(line)) return [at + 1, make("hr")];
  if (QUOTE.test(line)) {
    let end = at + 1;
    while (end < lines.length && (QUOTE.test(lines[end]) || !interrupts(lines, end))) end += 1;
    const inner = lines.slice(at, end).map((one) => one.replace(QUOTE, ""));
    return [end, make("blockquote", {}, ...nodesOf(inner, depth))];
  }
  if (ITEM.test(line)) return list(lines, at, depth);
  if (startsTable(lines, at)) return table(lines, at);
  const close = MATH_FENCE[line.trim().slice(0, 2)];
  if (close) {
    const last = lines.findIndex(
      (one, i) =>
        i >= at &&
        one
          .trim()
          .slice(i > at ? 0 : 2)
          .endsWith(close),
    );
    if (last >= 0) return [last + 1, make("p", { class: "math" }, lines.slice(at, last + 1).join("\n"))];
  }
  let end = at + 1;
  while (end < lines.length && !interrupts(lines, end)) end += 1;
  const text = lines
    .slice(at, end)
    .map((one) => one.trim())
    .join("\n");
  return [end, make("p", {}, ...spans(text))];
}

function fence(lines, at, mark, language) {
  const closes = new RegExp(`^\\s*\\${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closes.test(lines[end])) end += 1;
  const indent = indentOf(lines[at]);
  const code = lines.slice(at + 1, end).map((one) => one.slice(Math.min(indent, indentOf(one))));
  const head = make("div", { class: "code-head" }, make("span", {}, language || "text"));
  head.append(make("button", { type: "button", class: "copy-code" }, "Copy"));
  const body = make("pre", { tabindex: "0" }, make("code", {}, ...highlight(code.join("\n"), language)));
  return [end + 1, make("div", { class: "code" }, head, body)];
}

/** A list, with what is indented below its items. Two spaces are enough, which models often write. */
function list(lines, at, depth) {
  const [, indent, first] = ITEM.exec(lines[at]);
  const kind = first.at(-1); // "-", "*", "+", "." or ")".
  const ordered = /\d/.test(first);
  const made = make(
    ordered ? "ol" : "ul",
    ordered && first.slice(0, -1) !== "1" ? { start: parseInt(first) } : {},
  );
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[2].at(-1) !== kind || RULE.test(lines[end]) || item[1].length > indent.length + 1)
      break;
    const least = item[1].length + 2;
    const inner = [item[4] ?? ""];
    for (end += 1; end < lines.length; end += 1) {
      const line = lines[end];
      if (!line.trim()) inner.push("");
      else if (indentOf(line) >= least) inner.push(line.slice(Math.min(indentOf(line), least)));
      else if (lines[end - 1].trim() && !interrupts(lines, end) && !ITEM.test(line)) inner.push(line);
      else break;
    }
    const task = /^\[([ xX])\]\s/.exec(inner[0]);
    if (task) inner[0] = (task[1] === " " ? "☐ " : "☑ ") + inner[0].slice(4);
    made.append(make("li", task ? { class: "task" } : {}, ...nodesOf(inner, depth)));
  }
  return [end, made];
}

/** The cells of a row, where a bar in code or behind a backslash is no border. */
function cells(line) {
  const inner = line
    .trim()
    .replace(/^\|/, "")
    .replace(/(?<!\\)\|$/, "");
  return [...inner.matchAll(/((?:\\.|`[^`]*`|[^|\\]|\\$)*)(?:\||$)/g)]
    .map((found) => found[1].trim().replaceAll("\\|", "|"))
    .slice(0, -1); // The pattern also matches the empty end.
}

function table(lines, at) {
  const sides = cells(lines[at + 1]).map((rule) =>
    rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : null,
  );
  const row = (line, tag) =>
    make("tr", {}, ...sides.map((side, i) => make(tag, { class: side }, ...spans(cells(line)[i] ?? ""))));
  const body = make("tbody");
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end += 1) body.append(row(lines[end], "td"));
  const made = make("table", {}, make("thead", {}, row(lines[at], "th")), body);
  return [end, make("div", { class: "table", tabindex: "0" }, made)];
}

// Enough colour to read code by, for every language alike; no attempt at a grammar.
const KEYWORDS =
  /^(?:and|as|async|await|break|case|catch|class|const|continue|def|del|do|elif|else|enum|except|export|extends|finally|fn|for|from|func|function|if|impl|import|in|interface|is|lambda|let|loop|match|mut|new|not|or|package|pass|pub|raise|return|static|struct|super|switch|this|throw|try|type|use|var|void|while|with|yield|None|True|False|null|nil|true|false|self|select|SELECT|FROM|WHERE|JOIN|ORDER|GROUP|BY)$/;
const HASH_COMMENTS =
  /^(?:python|py|bash|sh|shell|zsh|yaml|yml|toml|ruby|rb|r|make|makefile|dockerfile|perl)$/i;
const TOKENS =
  /(#[^\n]*)|(\/\/[^\n]*|\/\*[^]*?(?:\*\/|$))|("""[^]*?(?:"""|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'|`[^`]*`?)|\b(\d[\w.]*)|([A-Za-z_]\w*)/g;

function highlight(code, language) {
  if (!language || /^(?:text|txt|plain|markdown|md|diff)$/i.test(language) || code.length > 40000)
    return [code];
  const hash = HASH_COMMENTS.test(language);
  const nodes = [];
  let done = 0;
  for (const found of code.matchAll(TOKENS)) {
    const [whole, hashed, slashed, string, number, word] = found;
    const comment = hash ? hashed : slashed;
    const kind = comment ? "c" : string ? "s" : number ? "n" : word && KEYWORDS.test(word) ? "k" : null;
    if (!kind) continue;
    nodes.push(code.slice(done, found.index), make("span", { class: kind }, whole));
    done = found.index + whole.length;
  }
  return [...nodes, code.slice(done)].filter((node) => node !== "");
}

// --- While it arrives ----------------------------------------------------------------------------

/** Makes `old` say what `fresh` says with as few changes as will do: what a person has selected or
 * scrolled sideways stays so. */
function patch(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.length));
    else old.data = fresh.data;
  } else if (
    old.nodeName === fresh.nodeName &&
    old.attributes.length === fresh.attributes.length &&
    [...fresh.attributes].every(({ name, value }) => old.getAttribute(name) === value)
  ) {
    patchChildren(old, 0, [...fresh.childNodes]);
  } else old.replaceWith(fresh);
}

function patchChildren(parent, from, fresh) {
  const old = [...parent.childNodes].slice(from);
  fresh.forEach((node, i) => (i < old.length ? patch(old[i], node) : parent.append(node)));
  old.slice(fresh.length).forEach((node) => node.remove());
}

/** Shows a text that grows. Blocks that can change no more are neither parsed nor touched again. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.settled = 0; // Characters of `text` that lie in finished blocks,
    this.kept = 0; // and the nodes for them.
    this.text = "";
  }

  update(text) {
    if (!text.startsWith(this.text)) this.settled = this.kept = 0;
    this.text = text;
    const lines = text.slice(this.settled).split("\n");
    const found = blocks(lines);
    patchChildren(
      this.root,
      this.kept,
      found.map(({ node }) => node),
    );
    // A block is finished when the next one has a whole line: half a line ("-") may yet continue it.
    const last = found.findLastIndex(({ line }) => line < lines.length - 1);
    if (last > 0) {
      this.kept += last;
      for (const line of lines.slice(0, found[last].line)) this.settled += line.length + 1;
    }
  }
}
