// The npm package `openai` against a server that runs: what a JavaScript program does with it, and what it must get.
//
//   NODE_PATH=DIR/node_modules node tests/serve/client.mjs '{"address": "http://127.0.0.1:8000", "key": "k", "base": "b", "adapter": "a"}'
//
// Prints one line for each check that holds; the first that doesn't ends it with what came instead.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const { default: OpenAI } = createRequire(import.meta.url)("openai");
const { address, key, base, adapter } = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: key || "unused", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Add 3 and 4" }];
const greedy = { model: adapter, messages, temperature: 0, max_tokens: 12 };

const gathered = async (stream, text) => {
  let whole = "";
  for await (const chunk of stream) for (const choice of chunk.choices) whole += text(choice) ?? "";
  return whole;
};
const refused = async (kind, work) => {
  const error = await work.then(() => assert.fail("it was answered"), (error) => error);
  assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
  return error;
};
const metric = async (name) => {
  const answer = await fetch(`${address}/metrics`, { headers: { authorization: `Bearer ${key}` } });
  const line = (await answer.text()).split("\n").find((line) => line.startsWith(name));
  return Number(line?.split(" ").at(-1) ?? 0);
};
const CANCELLED = 'deltaw:request_success_total{finished_reason="cancelled"}';
const letGo = async (before) => {
  for (let turn = 0; turn < 400; turn++) {
    if ((await metric(CANCELLED)) > before && (await metric("deltaw:num_requests_running")) === 0) return;
    await new Promise((done) => setTimeout(done, 25));
  }
  assert.fail("the server goes on for a client that has left");
};

const checks = {
  async "models are listed, and one that isn't served is a 404"() {
    const models = [];
    for await (const model of client.models.list()) models.push(model);
    assert.equal(models[0].id, base);
    assert.equal(models.find((model) => model.id === adapter).parent, base);
    assert.equal((await client.models.retrieve(adapter)).id, adapter);
    const error = await refused(OpenAI.NotFoundError, client.models.retrieve("no-such-model"));
    assert.equal(error.code, "model_not_found");
  },

  async "a chat's answer, and the same as a stream"() {
    const whole = await client.chat.completions.create(greedy);
    const [choice] = whole.choices;
    assert.equal(choice.message.role, "assistant");
    assert.ok(["stop", "length"].includes(choice.finish_reason));
    assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
    const stream = await client.chat.completions.create({ ...greedy, stream: true });
    assert.equal(await gathered(stream, (choice) => choice.delta.content), choice.message.content);
    const helper = client.chat.completions.stream({ ...greedy, stream_options: { include_usage: true } });
    assert.equal(await helper.finalContent(), choice.message.content);
    assert.deepEqual(await helper.totalUsage(), { ...whole.usage });
  },

  async "base and adapter differ, and a seed repeats an answer"() {
    const ask = (model) => client.chat.completions.create({ ...greedy, model, logprobs: true, max_tokens: 1 });
    const [one, other] = await Promise.all([ask(base), ask(adapter)]);
    assert.notEqual(one.choices[0].logprobs.content[0].logprob, other.choices[0].logprobs.content[0].logprob);
    const drawn = { ...greedy, temperature: 1, seed: 7, n: 2 };
    const [first, again] = await Promise.all([drawn, drawn].map((asked) => client.chat.completions.create(asked)));
    assert.deepEqual(first.choices, again.choices);
    assert.equal(first.choices.length, 2);
  },

  async "logprobs of a chat"() {
    const answer = await client.chat.completions.create({ ...greedy, logprobs: true, top_logprobs: 3 });
    for (const token of answer.choices[0].logprobs.content) {
      assert.equal(token.top_logprobs.length, 3);
      assert.equal(token.token, token.top_logprobs[0].token);
      assert.ok(token.logprob <= 0 && Array.isArray(token.bytes));
    }
  },

  async "completions: texts, ids, echo, logprobs, a stream"() {
    const asked = { model: adapter, prompt: ["say 3", "say 4"], temperature: 0, max_tokens: 8 };
    const whole = await client.completions.create(asked);
    assert.deepEqual(whole.choices.map((choice) => choice.index), [0, 1]);
    const texts = ["", ""];
    for await (const chunk of await client.completions.create({ ...asked, stream: true }))
      for (const choice of chunk.choices) texts[choice.index] += choice.text;
    assert.deepEqual(texts, whole.choices.map((choice) => choice.text));
    const scored = await client.completions.create({ ...asked, prompt: [5, 6, 7], echo: true, logprobs: 2, max_tokens: 0 });
    const { tokens, token_logprobs: logprobs, top_logprobs: top } = scored.choices[0].logprobs;
    assert.equal(tokens.length, 3);
    assert.equal(logprobs[0], null);
    assert.ok(logprobs[1] < 0 && Object.values(top[2]).includes(logprobs[2]));
  },

  async "stop texts, a system prompt, tools that this template doesn't take"() {
    const { choices } = await client.chat.completions.create({ ...greedy, max_tokens: 8 });
    const stop = choices[0].message.content.slice(1, 3);
    const cut = await client.chat.completions.create({ ...greedy, max_tokens: 8, stop: [stop] });
    assert.equal(cut.choices[0].finish_reason, "stop");
    assert.ok(!cut.choices[0].message.content.includes(stop));
    const parameters = { type: "object", properties: { city: { type: "string" } } };
    const tools = [{ type: "function", function: { name: "weather", description: "of a city", parameters } }];
    const system = [{ role: "system", content: "Be brief." }, ...messages];
    const asked = { ...greedy, messages: system, tools };
    const error = await refused(OpenAI.BadRequestError, client.chat.completions.create({ ...asked, tool_choice: "auto" }));
    assert.equal(error.param, "tools");
    const answer = await client.chat.completions.create({ ...asked, tool_choice: "none" });
    assert.equal(typeof answer.choices[0].message.content, "string");
  },

  async "errors have their class, their field and their code"() {
    const chat = client.chat.completions;
    assert.equal((await refused(OpenAI.BadRequestError, chat.create({ ...greedy, n: 0 }))).param, "n");
    assert.equal((await refused(OpenAI.BadRequestError, chat.create({ ...greedy, nonsense: 1 }))).param, "nonsense");
    const penalty = { ...greedy, presence_penalty: 1, stream: true };
    assert.equal((await refused(OpenAI.BadRequestError, chat.create(penalty))).param, "presence_penalty");
    const missing = { ...greedy, model: "../etc" };
    assert.equal((await refused(OpenAI.NotFoundError, chat.create(missing))).code, "model_not_found");
    const long = { model: adapter, prompt: Array(100_000).fill(5), max_tokens: 1 };
    const error = await refused(OpenAI.BadRequestError, client.completions.create(long));
    assert.equal(error.code, "context_length_exceeded");
    const stranger = new OpenAI({ baseURL: `${address}/v1`, apiKey: "wrong", maxRetries: 0 });
    if (key) assert.equal((await refused(OpenAI.AuthenticationError, stranger.models.list())).status, 401);
  },

  async "a client that leaves is let go: a stream, and a whole answer"() {
    const { tokens } = await client.post(`${address}/tokenize`, { body: { prompt: "a" } });
    const endless = { ...greedy, max_tokens: 200, logit_bias: { [tokens.at(-1)]: 100 } };
    let before = await metric(CANCELLED);
    const stream = await client.chat.completions.create({ ...endless, stream: true });
    for await (const chunk of stream) if (chunk.choices[0]?.delta.content) break; // which aborts it
    await letGo(before);
    before = await metric(CANCELLED);
    const controller = new AbortController();
    const asked = client.chat.completions.create(endless, { signal: controller.signal });
    while ((await metric("deltaw:num_requests_running")) === 0) await new Promise((done) => setTimeout(done, 5));
    controller.abort();
    await refused(OpenAI.APIUserAbortError, asked);
    await letGo(before);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(name);
}
