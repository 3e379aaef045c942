// The chat as this tab keeps it, so that a reload loses nothing: in sessionStorage, which is gone with the tab.
//
//     {columns: [{model, scale}], turns: [{prompt, answers: [answer or null, one per column]}], settings}
//     an answer: {label, figures, error, pieces: [{text, tokens}]}
//
// Tokens with their probabilities are most of it. Where the browser's room for a tab (some 5 MB) doesn't hold them, the
// words alone are kept.

import { made } from "./dom.js";
import { Words } from "./tokens.js";

const NAME = "deltaw-chat";

export function remember(chat) {
  if (!put(chat) && !put(bare(chat))) sessionStorage.removeItem(NAME);
}

/** What was kept, or null. */
export function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem(NAME));
  } catch {
    return null;
  }
}

export function forget() {
  sessionStorage.removeItem(NAME);
}

/** An answer, as it is kept; null for none. */
export function kept(given) {
  const said = (selector) => given.element.querySelector(selector).textContent;
  return given ? { label: said("h3"), figures: said(".figures"), error: said(".error"), pieces: given.pieces } : null;
}

/** An answer from before the reload. */
export function shownAgain({ label, figures, error, pieces }) {
  const given = { element: made("answer"), text: "", pieces };
  const show = (selector) => given.element.querySelector(selector);
  const words = new Words(show(".words"));
  for (const piece of pieces) words.add(piece);
  words.end();
  given.text = words.text;
  [show("h3").textContent, show(".figures").textContent, show(".error").textContent] = [label, figures, error];
  show(".error").hidden = !error;
  return given;
}

function put(chat) {
  try {
    sessionStorage.setItem(NAME, JSON.stringify(chat));
    return true;
  } catch {
    return false;
  }
}

function bare(chat) {
  const words = (answer) => answer && { ...answer, pieces: [{ text: answer.pieces.map((one) => one.text).join(""), tokens: [] }] };
  return { ...chat, turns: chat.turns.map((turn) => ({ ...turn, answers: turn.answers.map(words) })) };
}
