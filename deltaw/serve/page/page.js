// The page: columns (a model each), turns (a prompt, and each column's answer), and how to ask.
//
// A prompt goes to all columns at once; a column's conversation is the prompts with that column's own answers, so that
// they are kept in step and never mixed. What is changed above (a model, a scale) holds from the next answer on, and
// each answer says what gave it. A new column answers the conversation so far, turn after turn.

import { Refusal, answer, hasKey, models, report, setKey } from "./server.js";
import { switchTheme } from "./theme.js";
import { Words, explain } from "./tokens.js";

const MOST_COLUMNS = 4;
const FRAME = 16;  // ms

const at = (id) => document.getElementById(id);
const made = (id) => at(id).content.firstElementChild.cloneNode(true);

const columns = [];  // {element, answers: turn -> answer}
const turns = [];  // {prompt, element}
const touched = new Set();  // settings that the user has set: no adapter's own are put in their place
let known = [];  // the server's models
let round = null;  // the AbortController of the answers that are coming

// ---- models and columns

async function load() {
  try {
    known = await models();
  } catch (error) {
    return complain(error);
  }
  at("key-form").hidden = true;
  notice("");
  at("base-name").textContent = known[0]?.id ?? "";
  at("most").max = known[0]?.max_model_len ?? "";
  for (const column of columns) options(column);
  if (!columns.length) {
    for (const model of [known[0], known.find((model) => model.parent)]) if (model) add(model);
  }
  at("add").hidden = columns.length >= MOST_COLUMNS;
  if (known.length && known.every((model) => !model.parent)) {
    notice("No adapters are served: start “deltaw serve” with --adapters FOLDER to see one beside the base.");
  }
  buttons();
}

function add(model) {
  const column = { element: made("column"), answers: new Map() };
  columns.push(column);
  at("columns").append(column.element);
  const [select, scale] = [part(column, ".model"), part(column, ".scale input")];
  options(column, model.id);
  select.addEventListener("change", () => {
    about(column);
    suggest();
  });
  scale.addEventListener("input", () => about(column));
  part(column, ".remove").addEventListener("click", () => remove(column));
  part(column, ".report").addEventListener("click", (event) => openReport(event, column));
  about(column);
  suggest();
  arrange();
  return column;
}

function remove(column) {
  columns.splice(columns.indexOf(column), 1);
  column.element.remove();
  for (const given of column.answers.values()) {
    given.abort?.abort();
    given.element.remove();
  }
  arrange();
  at("add").focus();
}

function arrange() {
  document.body.style.setProperty("--columns", columns.length);
  columns.forEach((column, i) => {
    column.element.setAttribute("aria-label", `Column ${i + 1}`);
    part(column, ".remove").hidden = columns.length === 1;
  });
  at("add").hidden = columns.length >= MOST_COLUMNS || !known.length;
}

const part = (column, selector) => column.element.querySelector(selector);
const chosen = (column) => known.find((model) => model.id === part(column, ".model").value);
const scaled = (column) => Number(part(column, ".scale input").value);

/** The models to choose from, as the server has them now; one that is gone stays chosen, and asking it says so. */
function options(column, id = part(column, ".model").value) {
  const select = part(column, ".model");
  const gone = known.some((model) => model.id === id) ? [] : [{ id, parent: "gone" }];
  select.replaceChildren(...[...known, ...gone].map((model) => {
    const words = model.parent ? model.id : "base";
    return new Option(model.parent === "gone" ? `${words} (gone)` : words, model.id, false, model.id === id);
  }));
  about(column);
}

function about(column) {
  const model = chosen(column);
  part(column, ".scale").hidden = !model?.parent;
  part(column, ".scale output").textContent = scaled(column).toFixed(2);
  const link = part(column, ".report");
  link.hidden = !model?.report;
  if (model?.report) link.href = `v1/adapters/${encodeURIComponent(model.id)}/report`;
}

async function openReport(event, column) {
  if (!hasKey()) return;  // an ordinary link
  event.preventDefault();
  try {
    const address = URL.createObjectURL(await report(event.currentTarget.href));
    const link = Object.assign(document.createElement("a"), { href: address, download: "report.html" });
    link.click();
    URL.revokeObjectURL(address);
  } catch (error) {
    complain(error);
  }
}

/** An adapter answers what looks like its training: asked in the same form, with the same system prompt. */
function suggest() {
  const models = columns.map(chosen).filter(Boolean);
  const plain = models.find((model) => model.asking === "plain");
  if (!touched.has("form")) at("form").value = plain ? "plain" : "chat";
  if (!touched.has("system")) at("system").value = models.find((model) => model.system)?.system ?? "";
  const asPlain = at("form").value === "plain";
  const why = !plain ? "" : plain.parent ? ` “${plain.id}” was trained on plain text.` : " The base has no chat template.";
  at("form-note").textContent =
    (asPlain ? "The prompt is sent as it is, each by itself." : "Through the base's chat template.") + why;
  at("empty").textContent = "Ask something: every column gets the same prompt" +
    (asPlain ? ", each time without what was said before." : ", and each goes on with its own answers.");
  at("prompt").placeholder = asPlain ? "Plain text for all columns" : "Ask all columns";
  at("system-field").hidden = asPlain;
}

// ---- asking

async function send() {
  const prompt = at("prompt").value;
  if (!prompt.trim() || round || !columns.length || !valid()) return;
  at("prompt").value = "";
  grow();
  const turn = { prompt, element: made("turn") };
  turn.element.querySelector(".asked .words").textContent = prompt;
  turns.push(turn);
  at("conversation").append(turn.element);
  at("empty").hidden = true;
  scrollTo({ top: document.documentElement.scrollHeight });
  await together(columns.map((column) => () => ask(column, turn)));
}

async function regenerate() {
  if (!round && turns.length && valid()) await together(columns.map((column) => () => ask(column, turns.at(-1))));
}

/** A new column catches up with the others. */
async function catchUp(column) {
  await together([async () => {
    for (const turn of turns) if (!round.signal.aborted && !(await ask(column, turn))) return;
  }]);
}

async function together(jobs) {
  round = new AbortController();
  at("conversation").setAttribute("aria-busy", "true");
  buttons();
  try {
    await Promise.all(jobs.map((job) => job()));
  } finally {
    round = null;
    at("conversation").setAttribute("aria-busy", "false");
    buttons();
  }
}

/** Whether the settings can be sent; the browser points at one that can't. */
function valid() {
  const wrong = [at("most"), at("seed")].find((field) => !field.checkValidity());
  if (!wrong) return true;
  panel(true);
  wrong.reportValidity();
  return false;
}

/** One column's answer to one turn, in place of one that it gave before. True if it came to its end. */
async function ask(column, turn) {
  const model = chosen(column) ?? { id: part(column, ".model").value, parent: "gone" };
  const given = { element: made("answer"), text: "", abort: new AbortController() };
  const show = (selector) => given.element.querySelector(selector);
  show("h3").textContent = model.parent ? model.id : "base";
  if (model.parent && scaled(column) !== 1) show("h3").textContent += ` × ${scaled(column).toFixed(2)}`;
  keepLow(() => put(column, turn, given));
  const words = new Words(show(".words"));
  const signal = AbortSignal.any([round.signal, given.abort.signal]);
  const figures = { begin: null, tokens: 0, finish: null };
  let [timer, pause] = [null, FRAME];
  given.element.classList.add("coming");
  try {
    const plain = at("form").value === "plain";
    for await (const piece of answer({ plain, body: request(column, turn, model, plain), signal })) {
      words.add(piece);
      given.text = words.text;
      timer ??= setTimeout(() => {
        timer = null;
        const begin = performance.now();
        keepLow(() => words.show());
        pause = Math.max(FRAME, 5 * (performance.now() - begin));
      }, pause);
      count(figures, piece);
    }
  } catch (error) {
    if (signal.aborted) figures.finish = "stopped";
    else keepLow(() => fail(show(".error"), error));
    return false;
  } finally {
    keepLow(() => {
      words.end();
      given.element.classList.remove("coming");
      show(".figures").textContent = summary(figures, given.text);
    });
  }
  return true;
}

function put(column, turn, given) {
  const before = column.answers.get(turn);
  column.answers.set(turn, given);
  if (before) before.element.replaceWith(given.element);
  else {
    const next = columns.slice(columns.indexOf(column) + 1).map((other) => other.answers.get(turn)).find(Boolean);
    turn.element.querySelector(".answers").insertBefore(given.element, next?.element ?? null);
  }
}

function request(column, turn, model, plain) {
  const body = {
    model: model.id, stream: true, stream_options: { include_usage: true },
    temperature: Number(at("temperature").value), max_tokens: Number(at("most").value),
  };
  if (at("seed").value) body.seed = Number(at("seed").value);
  if (model.parent) body.scale = scaled(column);
  const probabilities = at("probabilities").checked;
  if (plain) return { ...body, prompt: turn.prompt, ...(probabilities ? { logprobs: 5 } : {}) };
  return { ...body, messages: messages(column, turn), ...(probabilities ? { logprobs: true, top_logprobs: 5 } : {}) };
}

/** The column's conversation up to this turn, without turns that it has no answer to: roles must alternate. */
function messages(column, turn) {
  const said = at("system").value ? [{ role: "system", content: at("system").value }] : [];
  for (const earlier of turns.slice(0, turns.indexOf(turn))) {
    const text = column.answers.get(earlier)?.text;
    if (text) said.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: text });
  }
  return [...said, { role: "user", content: turn.prompt }];
}

// ---- what is seen of an answer beside its words

function count(figures, piece) {
  figures.begin ??= piece.text ? performance.now() : null;
  figures.finish = piece.finish ?? figures.finish;
  figures.tokens = piece.usage?.completion_tokens ?? figures.tokens + piece.tokens.length;
  if (piece.text || piece.finish) figures.end = performance.now();
}

function summary({ begin, end, tokens, finish }, text) {
  const said = [];
  if (tokens) said.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  const seconds = (end - begin) / 1000;
  if (tokens > 1 && seconds > 0.05) said.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (finish === "length") said.push("cut at the limit");
  if (finish === "stopped") said.push("stopped");
  if (!text && finish === "stop") said.push("an empty answer");
  return said.join(" · ");
}

function fail(element, error) {
  element.textContent = error instanceof Refusal ? error.message : `The page failed: ${error.message}`;
  element.hidden = false;
  if (error.status === 401) askForKey(error);
}

function complain(error) {
  if (error.status === 401) askForKey(error);
  else notice(error instanceof Refusal ? error.message : `The page failed: ${error.message}`);
}

function askForKey(error) {
  at("key-form").hidden = false;
  notice(hasKey() ? error.message : "");
  at("key").focus();
}

function notice(words) {
  at("notice").textContent = words;
  at("notice").hidden = !words;
}

/** Whoever reads at the page's end stays there as it grows. */
function keepLow(change) {
  const low = innerHeight + scrollY >= document.documentElement.scrollHeight - 60;
  change();
  if (low) scrollTo({ top: document.documentElement.scrollHeight });
}

// ---- the controls

function buttons() {
  at("stop").hidden = !round;
  at("send").disabled = Boolean(round) || !known.length;
  at("regenerate").hidden = !turns.length;
  at("regenerate").disabled = Boolean(round);
  at("add").disabled = Boolean(round);
}

function newChat() {
  round?.abort();
  for (const column of columns) column.answers.clear();
  turns.length = 0;
  at("conversation").replaceChildren();
  at("empty").hidden = false;
  buttons();
  at("prompt").focus();
}

function grow() {
  const field = at("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function panel(open) {
  at("settings").hidden = !open;
  at("settings-button").setAttribute("aria-expanded", open);
}

function listen() {
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  at("prompt").addEventListener("input", grow);
  at("stop").addEventListener("click", () => {
    round?.abort();
    at("prompt").focus();
  });
  at("regenerate").addEventListener("click", regenerate);
  at("new").addEventListener("click", newChat);
  at("add").addEventListener("click", () => {
    const taken = new Set(columns.map((column) => part(column, ".model").value));
    catchUp(add(known.find((model) => !taken.has(model.id)) ?? known.at(-1)));
  });
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(at("key").value);
    at("key").value = "";
    load();
  });
  at("settings-button").addEventListener("click", () => panel(at("settings").hidden));
  at("temperature").addEventListener("input", () => {
    at("temperature-value").textContent = Number(at("temperature").value).toFixed(1);
  });
  for (const id of ["form", "system"]) {
    at(id).addEventListener("input", () => {
      touched.add(id);
      suggest();
    });
  }
  at("probabilities").addEventListener("change", () => {
    at("conversation").classList.toggle("bare", !at("probabilities").checked);
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && !round) load();  // adapters come and go
  });
}

switchTheme(at("theme"));
panel(matchMedia("(min-width: 64rem)").matches);
listen();
explain(at("conversation"), at("alternatives"));
at("prompt").focus();
load();
