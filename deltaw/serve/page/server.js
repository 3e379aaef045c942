// What the page asks of the server: the models, and answers as they come. Nothing here knows the page.
//
// Addresses are relative to the page's own, so that it also works behind a proxy that serves it under a path.
// Whatever goes wrong is a `Refusal`, with words for people; an aborted fetch alone stays what it is.

const KEY = "deltaw-api-key";  // in sessionStorage: of this tab, until it is closed

export class Refusal extends Error {
  constructor(words, status = 0) {
    super(words);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

/** [{id, parent, report, asking, system}], the base first. */
export async function models() {
  const response = await request("v1/models", {});
  const { data } = await response.json();
  return [...data.filter((model) => !model.parent), ...data.filter((model) => model.parent)];
}

/** A run's report as a file; with a key, which a link can't send. */
export async function report(address) {
  return (await request(address, {})).blob();
}

/** Gives {text, tokens, finish, usage} for each piece of an answer; what a piece doesn't have is empty. */
export async function* answer({ plain, body, signal }) {
  const response = await request(plain ? "v1/completions" : "v1/chat/completions", { body, signal });
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const piece = parsed(data);
    if (piece.error) throw new Refusal(sentence(piece.error.message || "the server broke off with an error"));
    const choice = piece.choices?.[0];
    finished ||= Boolean(choice?.finish_reason);
    yield {
      text: (plain ? choice?.text : choice?.delta?.content) ?? "",
      tokens: plain ? completionTokens(choice?.logprobs) : chatTokens(choice?.logprobs),
      finish: choice?.finish_reason ?? null,
      usage: piece.usage ?? null,
    };
  }
  if (!finished) throw new Refusal("The connection broke off before the answer's end.");
}

async function request(path, { body, signal }) {
  const headers = {};
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, {
      method, headers, signal, body: body && JSON.stringify(body), cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("The server doesn't answer. Is “deltaw serve” still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  const wait = response.headers.get("Retry-After");
  const body = await response.json().catch(() => null);  // not JSON: a proxy's own page
  const words = body?.error?.message || (status === 401 ? "The server wants an API key." : `The server answered with status ${status}.`);
  const later = /^\d+$/.test(wait ?? "") ? ` Try again in ${wait} second${wait === "1" ? "" : "s"}.` : "";
  return new Refusal(sentence(words) + later, status);
}

function sentence(message) {
  const words = String(message);
  return words[0].toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");
}

/** The data of each server-sent event. Comments (lines that begin with a colon) keep a connection alive. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += value ?? "";
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = done ? "" : blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
      if (done) return;
    }
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Refusal("The connection broke off before the answer's end.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Refusal("The server sent something that isn't an answer.");
  }
}

// A token: {text, bytes or null, logprob, top: [{text, logprob}]}, the likeliest first.

function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map((token) => ({
    text: token.token, bytes: token.bytes ?? null, logprob: token.logprob,
    top: (token.top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob })),
  }));
}

function completionTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((text, i) => ({
    text, bytes: null, logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([other, logprob]) => ({ text: other, logprob }))
      .sort((one, other) => other.logprob - one.logprob),
  }));
}
