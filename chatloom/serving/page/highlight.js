/* Colours for code: comments, strings, numbers and the words that most languages share. No grammar, no markup. */

import { make } from "./dom.js";

const WORDS = new Set(
  ("and as async await bool break case catch char class const continue def default delete do double elif else enum except export extends " +
    "false finally float fn for from func function go if impl import in int interface is lambda let long match module mut namespace new nil " +
    "none not null or package pass private protected pub public raise return self static string struct super switch this throw throws trait true " +
    "try type typeof union unless until use using val var void where while with yield select insert update delete create table from where " +
    "group order by join on into values set limit echo then fi done local").split(" "),
);
const HASH = new Set(["python", "py", "bash", "sh", "shell", "zsh", "ruby", "rb", "r", "yaml", "yml", "toml", "perl", "make", "makefile", "dockerfile"]);
const DASH = new Set(["sql", "lua", "haskell", "hs", "ada"]);
const PLAIN = new Set(["text", "txt", "plain", "markdown", "md", "console", "output", "diff"]);
const STRING = String.raw`"""[\s\S]*?(?:"""|$)|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|` + "`(?:\\\\.|[^`\\\\])*`";
const REST = String.raw`|(?<string>${STRING})|(?<number>\b\d[\w.]*)|(?<word>[A-Za-z_]\w*)`;
const LONGEST = 20000;

const comment = (language) => (HASH.has(language) ? "#.*" : DASH.has(language) ? "--.*" : String.raw`\/\/.*|\/\*[\s\S]*?(?:\*\/|$)`);

/** The pieces of `code`: text, and elements whose class says what they are. */
export function highlight(code, language) {
  if (!language || PLAIN.has(language) || code.length > LONGEST) return [code];
  const pieces = [];
  let end = 0;
  for (const found of code.matchAll(new RegExp(`(?<comment>${comment(language)})${REST}`, "g"))) {
    const { comment, string, number, word } = found.groups;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : WORDS.has(word.toLowerCase()) ? "word" : code[found.index + word.length] === "(" ? "call" : null;
    if (!kind) continue;
    pieces.push(code.slice(end, found.index), make("span", { class: `code-${kind}` }, found[0]));
    end = found.index + found[0].length;
  }
  pieces.push(code.slice(end));
  return pieces;
}
