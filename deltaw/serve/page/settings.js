// How models are asked: the fields beside the conversation, what may be sent of them, and what is kept over a reload.

import { at } from "./dom.js";

const FIELDS = ["form", "system", "temperature", "most", "seed", "probabilities"];
const touched = new Set();  // those that the user has set: no adapter's own are put in their place

export const isTouched = (id) => touched.has(id);

export function values() {
  return {
    fields: Object.fromEntries(FIELDS.map((id) => [id, at(id).type === "checkbox" ? at(id).checked : at(id).value])),
    touched: [...touched],
  };
}

export function setValues({ fields, touched: ids }) {
  for (const id of FIELDS) at(id)[at(id).type === "checkbox" ? "checked" : "value"] = fields[id];
  for (const id of ids) touched.add(id);
  warmth();
  shaded();
}

/** Whether they can be sent; the browser points at one that can't. */
export function valid() {
  const wrong = [at("most"), at("seed")].find((field) => !field.checkValidity());
  if (!wrong) return true;
  panel(true);
  wrong.reportValidity();
  return false;
}

export function panel(open) {
  at("settings").hidden = !open;
  at("settings-button").setAttribute("aria-expanded", open);
}

/** `changed`: called when the user has set how models are asked. */
export function listenToSettings(changed) {
  at("settings-button").addEventListener("click", () => panel(at("settings").hidden));
  at("temperature").addEventListener("input", warmth);
  at("probabilities").addEventListener("change", shaded);
  for (const id of ["form", "system"]) {
    at(id).addEventListener("input", () => {
      touched.add(id);
      changed();
    });
  }
}

function warmth() {
  at("temperature-value").textContent = Number(at("temperature").value).toFixed(1);
}

function shaded() {
  at("conversation").classList.toggle("bare", !at("probabilities").checked);
}
