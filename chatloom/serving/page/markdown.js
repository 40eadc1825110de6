/* Markdown to elements. The text is the model's, so nobody's: every piece of it goes in as text, addresses are checked,
 * HTML is shown as it was written, and pictures are links, since loading one would tell its server who reads here. */

import { icon, make } from "./dom.js";
import { highlight } from "./highlight.js";
import { label } from "./words.js";

const DEEPEST = 10; // quotes in lists in quotes: below, text is text
const LONGEST = 20000; // characters of one paragraph that are looked at for emphasis and links

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|$)/;
const TABLE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const indentOf = (line) => /^[ \t]*/.exec(line)[0].replaceAll("\t", "    ").length;
const blank = (line) => line.trim() === "";

/** Show `text` in `container`. Blocks that it showed before stay as they are, so that a stream changes only its end. */
export function render(container, text) {
  const shown = container.blocks ?? [];
  const blocks = parse(text.replaceAll("\r\n", "\n").split("\n"), 0);
  let same = 0;
  while (same < shown.length && same < blocks.length && shown[same] === blocks[same].source) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map((block) => block.build()));
  container.blocks = blocks.map((block) => block.source);
}

// --- blocks ----------------------------------------------------------------------------------------------------------

/** The blocks of `lines`: each with its source and a function that makes its element. */
function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at++;
      continue;
    }
    const [end, build] = block(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return blocks;
}

/** Where the block that begins at `at` ends, and what makes its element. */
function block(lines, at, depth) {
  const line = lines[at];
  let found;
  if ((found = FENCE.exec(line))) return fence(lines, at, found);
  if ((found = HEADING.exec(line))) {
    const [, marks, text] = found;
    // The page's own heading is the first: an answer's begin below it.
    return [at + 1, () => inline(make(`h${Math.min(marks.length + 1, 6)}`), text.replace(/[ \t]#+[ \t]*$/, ""))];
  }
  if (RULE.test(line)) return [at + 1, () => make("hr")];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

function begins(lines, at, depth) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at) || (depth < DEEPEST && (QUOTE.test(line) || ITEM.test(line)));
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !begins(lines, end, depth)) end++;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [end, () => inline(make("p"), text)];
}

function fence(lines, at, [, indent, marks, info]) {
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end++;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent.length, indentOf(line)))).join("\n");
  const language = info.trim().split(/\s/)[0].toLowerCase();
  return [Math.min(end + 1, lines.length), () => codeBlock(code, language)];
}

function codeBlock(code, language) {
  const button = make("button", { type: "button", class: "quiet copy-code" }, icon("copy"));
  label(button, "copy");
  return make(
    "figure",
    { class: "code" },
    make("figcaption", {}, make("span", {}, language), button),
    make("pre", { tabindex: "0" }, make("code", {}, ...highlight(code, language))),
  );
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && !blank(lines[end]) && (QUOTE.test(lines[end]) || !begins(lines, end, depth))) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end, () => make("blockquote", {}, ...parse(inner, depth + 1).map((block) => block.build()))];
}

const isOrdered = (marker) => /^\d/.test(marker);

function list(lines, at, depth) {
  const ordered = isOrdered(ITEM.exec(lines[at])[2]);
  const start = ordered ? Number.parseInt(ITEM.exec(lines[at])[2], 10) : null;
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || isOrdered(found[2]) !== ordered || RULE.test(lines[end])) break;
    const offset = found[1].length + found[2].length + Math.min(found[3]?.length ?? 1, 4);
    const inner = [found[4] ?? ""];
    end++;
    while (end < lines.length) {
      const line = lines[end];
      if (blank(line)) {
        // A blank line belongs to the item where something of it, or the next item, follows.
        let next = end;
        while (next < lines.length && blank(lines[next])) next++;
        if (next === lines.length || (indentOf(lines[next]) < 2 && !sameList(lines[next], ordered))) break;
        if (indentOf(lines[next]) < 2) {
          end = next;
          loose = true;
          break;
        }
        loose = true;
        inner.push("");
        end = next;
      } else if (indentOf(line) >= 2) {
        // Models indent by two where CommonMark wants three: both are meant to be inside.
        inner.push(outdent(line, offset));
        end++;
      } else if (begins(lines, end, depth) || blank(inner.at(-1))) break;
      else {
        inner.push(line);
        end++;
      }
    }
    items.push(inner);
    if (end < lines.length && blank(lines[end])) break;
  }
  const build = () => {
    const made = items.map((inner) => item(parse(inner, depth + 1), loose));
    return make(ordered ? "ol" : "ul", { start: start !== null && start !== 1 ? start : null }, ...made);
  };
  return [end, build];
}

function sameList(line, ordered) {
  const found = ITEM.exec(line);
  return found !== null && isOrdered(found[2]) === ordered && !RULE.test(line);
}

function outdent(line, most) {
  const expanded = line.replace(/^[ \t]*/, (space) => space.replaceAll("\t", "    "));
  return expanded.slice(Math.min(most, indentOf(line)));
}

function item(blocks, loose) {
  const made = make("li");
  for (const block of blocks) {
    const element = block.build();
    if (element.localName === "p" && !loose) made.append(...element.childNodes);
    else made.append(element);
  }
  return made;
}

const isTable = (lines, at) =>
  at + 1 < lines.length && lines[at].includes("|") && lines[at + 1].includes("-") && TABLE.test(lines[at + 1]) && cells(lines[at]).length === cells(lines[at + 1]).length;

function cells(line) {
  const parts = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (parts.length > 1 && blank(parts.at(-1))) parts.pop();
  return parts.map((part) => part.trim().replaceAll("\\|", "|"));
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const sides = cells(lines[at + 1]).map((mark) => (/^:-+:$/.test(mark) ? "center" : /-:$/.test(mark) ? "right" : null));
  const row = (line, name) => make("tr", {}, ...sides.map((side, number) => inline(make(name, { class: side }), cells(line)[number] ?? "")));
  const build = () =>
    make(
      "div",
      { class: "table", tabindex: "0" },
      make("table", {}, make("thead", {}, row(lines[at], "th")), make("tbody", {}, ...lines.slice(at + 2, end).map((line) => row(line, "td")))),
    );
  return [end, build];
}

// --- inside a paragraph ----------------------------------------------------------------------------------------------

const URL_IN_TEXT = /https?:\/\/[^\s<>"`，。、；：！？（）【】《》「」]+/y;
const ANGLE = /<(https?:\/\/[^\s<>]+|mailto:[^\s<>]+)>/y;
const BREAK = /<br[ \t]*\/?>/iy;
const TARGET = /\([ \t]*<?((?:[^\s()<>]|\([^\s()<>]*\))*)>?(?:[ \t]+(?:"[^"]*"|'[^']*'))?[ \t]*\)/y;
const SPECIAL = /[\\`*_~![<\nhH]/g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;

/** Put `text` into `parent` with its emphasis, code and links. */
function inline(parent, text, depth = 0) {
  parent.append(...(text.length > LONGEST || depth > DEEPEST ? [text] : pieces(text, depth)));
  return parent;
}

const match = (pattern, text, at) => {
  pattern.lastIndex = at;
  return pattern.exec(text);
};

function pieces(text, depth) {
  const found = []; // text, elements, and runs of marks that may turn out to be emphasis
  let plain = "";
  const put = (piece) => {
    if (plain) found.push(plain);
    plain = "";
    found.push(piece);
  };
  let at = 0;
  while (at < text.length) {
    const next = match(SPECIAL, text, at)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at === text.length) break;
    const [length, piece] = special(text, at, depth);
    if (piece === null) plain += text.slice(at, at + length);
    else if (typeof piece === "string") plain += piece;
    else put(piece);
    at += length;
  }
  if (plain) found.push(plain);
  return emphasised(found);
}

/** Length of what stands at `at`, and its piece; null where it is only text. */
function special(text, at, depth) {
  const character = text[at];
  let found;
  switch (character) {
    case "\n":
      return [1, make("br")];
    case "\\":
      if (text[at + 1] === "\n") return [2, make("br")];
      return PUNCTUATION.test(text[at + 1] ?? "") ? [2, text[at + 1]] : [1, null];
    case "`":
      return codeSpan(text, at);
    case "!":
      return text[at + 1] === "[" && (found = linkAt(text, at + 1, depth)) ? [found[0] + 1, found[1]] : [1, null];
    case "[":
      return linkAt(text, at, depth) ?? [1, null];
    case "<":
      if ((found = match(BREAK, text, at))) return [found[0].length, make("br")];
      return (found = match(ANGLE, text, at)) ? [found[0].length, link(found[1], [found[1]])] : [1, null];
    case "h":
    case "H":
      return bareLink(text, at);
    default:
      return marks(text, at);
  }
}

function codeSpan(text, at) {
  const run = /`+/y;
  const ticks = match(run, text, at)[0];
  let end = at + ticks.length;
  for (;;) {
    end = text.indexOf("`", end);
    if (end < 0) return [ticks.length, null];
    const closing = match(run, text, end)[0];
    if (closing.length === ticks.length) break;
    end += closing.length;
  }
  const inner = text.slice(at + ticks.length, end).replaceAll("\n", " ");
  const trimmed = /^ .*\S.* $/.test(inner) ? inner.slice(1, -1) : inner;
  return [end + ticks.length - at, make("code", {}, trimmed)];
}

function linkAt(text, at, depth) {
  let open = 0;
  let end = at;
  for (; end < text.length && end < at + 1000; end++) {
    if (text[end] === "\\") end++;
    else if (text[end] === "[") open++;
    else if (text[end] === "]" && --open === 0) break;
  }
  if (text[end] !== "]" || text[end + 1] !== "(") return null;
  const target = match(TARGET, text, end + 1);
  if (!target) return null;
  const words = text.slice(at + 1, end);
  const inner = words ? pieces(words, depth + 1) : [target[1]];
  return [end + 1 + target[0].length - at, depth > DEEPEST ? make("span", {}, words) : link(target[1], inner)];
}

function bareLink(text, at) {
  const found = /\w/.test(text[at - 1] ?? "") ? null : match(URL_IN_TEXT, text, at);
  if (!found) return [1, null];
  let address = found[0].replace(/[.,;:!?'*_~]+$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  return [address.length, link(address, [address])];
}

/** A link where the address is one that may be opened, else its words alone. */
function link(address, words) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(address)) return make("span", {}, ...words);
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...words);
}

/** A run of `*`, `_` or `~`. Chinese has no spaces between words, so only `_` asks for the end of one. */
function marks(text, at) {
  const mark = text[at];
  let end = at;
  while (text[end] === mark) end++;
  const before = text[at - 1] ?? " ";
  const after = text[end] ?? " ";
  const inWord = mark === "_" && /\w/.test(before) && /\w/.test(after);
  return [
    end - at,
    { mark, length: end - at, count: end - at, opens: !inWord && !/\s/.test(after), closes: !inWord && !/\s/.test(before) },
  ];
}

const isMarks = (piece) => piece.mark !== undefined;
const literal = (piece) => (isMarks(piece) ? piece.mark.repeat(piece.count) : piece);

/** Whether two runs may belong together. CommonMark's rule of three reads `**a*b*c**` as it is meant. */
const pairs = (begin, end) =>
  begin.mark === end.mark &&
  begin.opens &&
  !((begin.closes || end.opens) && (begin.length + end.length) % 3 === 0 && (begin.length % 3 !== 0 || end.length % 3 !== 0));

/** Runs of marks that belong together as elements: each that closes takes the nearest that opens. */
function emphasised(found) {
  for (let close = 0; close < found.length; close++) {
    const end = found[close];
    if (!isMarks(end) || !end.closes) continue;
    while (end.count > 0) {
      const needed = end.mark === "~" ? 2 : 1;
      let open = close - 1;
      while (open >= 0 && !(pairs(found[open], end) && found[open].count >= needed)) open--;
      if (open < 0 || end.count < needed || open === close - 1) break;
      const begin = found[open];
      const count = Math.min(begin.count, end.count, 2);
      const inner = found.slice(open + 1, close).map(literal);
      const element = make(end.mark === "~" ? "del" : count === 2 ? "strong" : "em", {}, ...inner);
      begin.count -= count;
      end.count -= count;
      found.splice(open + 1, close - open - 1, element);
      close = open + 2;
    }
  }
  return found.map(literal);
}
