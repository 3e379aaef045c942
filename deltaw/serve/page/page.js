// The page: columns (a model each), turns (a prompt, and each column's answer), and how to ask.
//
// A prompt goes to all columns at once; a column's conversation is the prompts with that column's own answers, so that
// they are kept in step and never mixed. What is changed above (a model, a scale) holds from the next answer on, and
// each answer says what gave it. A new column answers the conversation so far, turn after turn.
//
// Adapters come and go while the page is open: its list is asked for again when it is looked at. A reload loses nothing
// (remember.js).

import { at, keepLow, made, notice } from "./dom.js";
import { Figures } from "./figures.js";
import { forget, kept, remember, remembered, shownAgain } from "./remember.js";
import { Refusal, answer, hasKey, models, report, setKey } from "./server.js";
import { isTouched, listenToSettings, panel, setValues, valid, values } from "./settings.js";
import { switchTheme } from "./theme.js";
import { Words, explain } from "./tokens.js";

const MOST_COLUMNS = 4;
const FRAME = 16;  // ms
const FRESH = 1000;  // ms for which the list of models isn't asked for again

const columns = [];  // {element, answers: turn -> answer}
const turns = [];  // {prompt, element}
let known = [];  // the server's models
let asked = -Infinity;  // when they were asked for
let round = null;  // the AbortController of the answers that are coming

// ---- models and columns

async function load() {
  asked = performance.now();
  const before = JSON.stringify(known);
  try {
    known = await models();
  } catch (error) {
    return complain(error);
  }
  at("key-form").hidden = true;
  notice("");
  at("base-name").textContent = known[0]?.id ?? "";
  at("most").max = known[0]?.max_model_len ?? "";
  if (JSON.stringify(known) !== before) for (const column of columns) options(column);
  if (!columns.length) begin();
  at("add").hidden = columns.length >= MOST_COLUMNS;
  if (known.length && known.every((model) => !model.parent)) {
    notice("No adapters are served: start “deltaw serve” with --adapters FOLDER to see one beside the base.");
  }
  buttons();
}

/** Models come and go, and one that looked whole turns out to be broken when it is asked. */
function refresh() {
  if (!round && !document.hidden && performance.now() - asked > FRESH) load();
}

/** With the chat that this tab had, or with the base and the first adapter that isn't known to be broken. */
function begin() {
  const chat = remembered();
  try {
    if (chat?.columns.length) return restore(chat);
  } catch {
    forget();  // of another version of this page
    while (columns.length) columns.pop().element.remove();
    turns.length = 0;
    at("conversation").replaceChildren();
  }
  for (const model of [known[0], known.find((model) => model.parent && !model.problem)]) if (model) add(model);
}

function restore({ columns: before, turns: said, settings }) {
  setValues(settings);
  for (const { model, scale } of before) add({ id: model }, scale);
  for (const { prompt, answers } of said) {
    const turn = newTurn(prompt);
    answers.forEach((answer, i) => {
      if (answer) put(columns[i], turn, shownAgain(answer));
    });
  }
}

/** What `restore` is given after a reload. */
function chat() {
  return {
    columns: columns.map((column) => ({ model: part(column, ".model").value, scale: scaled(column) })),
    turns: turns.map((turn) => ({
      prompt: turn.prompt,
      answers: columns.map((column) => kept(column.answers.get(turn))),
    })),
    settings: values(),
  };
}

function add(model, scaleOf = 1) {
  const column = { element: made("column"), answers: new Map() };
  columns.push(column);
  at("columns").append(column.element);
  const [select, scale] = [part(column, ".model"), part(column, ".scale input")];
  scale.value = scaleOf;
  options(column, model.id);
  for (const looked of ["pointerenter", "focus"]) select.addEventListener(looked, refresh);
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
    const state = model.parent === "gone" ? " (gone)" : model.problem ? " (broken)" : "";
    return new Option((model.parent ? model.id : "base") + state, model.id, false, model.id === id);
  }));
  about(column);
}

function about(column) {
  const model = chosen(column);
  part(column, ".scale").hidden = !model?.parent;
  part(column, ".scale output").textContent = scaled(column).toFixed(2);
  part(column, ".problem").textContent = model?.problem ?? "";
  part(column, ".problem").hidden = !model?.problem;
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
  if (!isTouched("form")) at("form").value = plain ? "plain" : "chat";
  if (!isTouched("system")) at("system").value = models.find((model) => model.system)?.system ?? "";
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
  const turn = newTurn(prompt);
  scrollTo({ top: document.documentElement.scrollHeight });
  await together(columns.map((column) => () => ask(column, turn)));
}

function newTurn(prompt) {
  const turn = { prompt, element: made("turn") };
  turn.element.querySelector(".asked .words").textContent = prompt;
  turns.push(turn);
  at("conversation").append(turn.element);
  at("empty").hidden = true;
  return turn;
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
    remember(chat());
    if (asked < 0) refresh();
  }
}

/** One column's answer to one turn, in place of one that it gave before. True if it came to its end. */
async function ask(column, turn) {
  const model = chosen(column) ?? { id: part(column, ".model").value, parent: "gone" };
  const given = { element: made("answer"), text: "", pieces: [], abort: new AbortController() };
  const show = (selector) => given.element.querySelector(selector);
  show("h3").textContent = model.parent ? model.id : "base";
  if (model.parent && scaled(column) !== 1) show("h3").textContent += ` × ${scaled(column).toFixed(2)}`;
  keepLow(() => put(column, turn, given));
  const words = new Words(show(".words"));
  const signal = AbortSignal.any([round.signal, given.abort.signal]);
  const figures = new Figures();
  let [timer, pause] = [null, FRAME];
  given.element.classList.add("coming");
  try {
    const plain = at("form").value === "plain";
    for await (const piece of answer({ plain, body: request(column, turn, model, plain), signal })) {
      words.add(piece);
      given.text = words.text;
      if (piece.text || piece.tokens.length) given.pieces.push({ text: piece.text, tokens: piece.tokens });
      timer ??= setTimeout(() => {
        timer = null;
        const begin = performance.now();
        keepLow(() => words.show());
        pause = Math.max(FRAME, 5 * (performance.now() - begin));
      }, pause);
      figures.count(piece);
    }
  } catch (error) {
    if (signal.aborted) figures.finish = "stopped";
    else keepLow(() => fail(show(".error"), error));
    asked = -Infinity;  // it may be gone, or broken
    return false;
  } finally {
    keepLow(() => {
      words.end();
      given.element.classList.remove("coming");
      show(".figures").textContent = figures.words(given.text);
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
  remember(chat());
  at("prompt").focus();
}

function grow() {
  const field = at("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
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
    catchUp(add(known.find((model) => !taken.has(model.id) && !model.problem) ?? known[0]));
  });
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(at("key").value);
    at("key").value = "";
    load();
  });
  listenToSettings(suggest);
  document.addEventListener("visibilitychange", refresh);
  addEventListener("focus", refresh);
  addEventListener("pagehide", () => columns.length && remember(chat()));
}

switchTheme(at("theme"));
panel(matchMedia("(min-width: 64rem)").matches);
listen();
explain(at("conversation"), at("alternatives"));
at("prompt").focus();
load();
