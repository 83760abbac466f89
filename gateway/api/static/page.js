// Talks to the gateway that served this page. What people, models and servers say is only ever inserted as text.

const API = new URL("v1/", document.baseURI);
const BASE_URL = API.href.replace(/\/$/, "");
const talk = byId("talk");
const messages = [];
let model = "";
let keyless = true;
let language = "python";
let answering = null;
let listing = null;

function byId(id) {
  return document.getElementById(id);
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function key() {
  return sessionStorage.getItem("key") ?? "";
}

// The API.

class APIError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, { body, signal } = {}) {
  const headers = {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const response = await fetch(new URL(path, API), { method, headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  throw new APIError(said(await response.text()) ?? `The server answered ${response.status}.`, response.status);
}

function said(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return null;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

async function* chunks(response) {
  for await (const event of events(response)) {
    if (event === "[DONE]") return;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new APIError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new APIError("The answer broke off.", response.status);
}

// The models and the key.

async function listModels() {
  listing?.abort();
  listing = new AbortController();
  try {
    const response = await call("models", { signal: listing.signal });
    const names = (await response.json()).data.map((entry) => entry.id);
    keyless = !key();
    showModels(names);
    showAccess(key() ? "Kept in this tab until it is closed." : "None needed from this machine.");
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 401) keyless = false;
    showModels([]);
    showAccess(!key() && error.status === 401 ? "This gateway wants a key." : error.message, Boolean(key()));
  }
}

function showModels(names) {
  const choices = names.map((name) => {
    const radio = element("input", { type: "radio", name: "model", value: name });
    return element("label", {}, radio, element("span", { textContent: name }));
  });
  byId("model-list").replaceChildren(
    ...(choices.length ? choices : [element("p", { className: "note", textContent: "None to show." })]),
  );
  choose(names.includes(model) ? model : (names[0] ?? ""));
}

function choose(name) {
  model = name;
  for (const radio of document.querySelectorAll("#model-list input")) radio.checked = radio.value === name;
  const whom = name ? [" to ", element("code", { textContent: name })] : ["."];
  byId("greeting")?.replaceChildren(element("span", {}, "Say something", ...whom));
  showSnippet();
}

function showAccess(text, bad = false) {
  const note = byId("access-note");
  note.textContent = text;
  note.classList.toggle("bad", bad);
}

// The chat.

async function ask(text) {
  byId("greeting")?.remove();
  const question = addTurn("question", text);
  const answer = addTurn("answer running", "");
  answering = new AbortController();
  showRunning(true);
  const began = performance.now();
  const facts = {};
  let ended = "";
  try {
    const asked = [...messages, { role: "user", content: text }];
    const body = { model, messages: asked, stream: true, stream_options: { include_usage: true } };
    const response = await call("chat/completions", { body, signal: answering.signal });
    for await (const chunk of chunks(response)) take(chunk, answer, facts, began);
    ended = facts.finish === "length" ? "cut at the limit" : "";
  } catch (error) {
    if (error.name === "AbortError") ended = "stopped";
    else addTurn("error", error.message).setAttribute("role", "alert");
  }
  facts.seconds = (performance.now() - began) / 1000;
  answering = null;
  showRunning(false);
  answer.classList.remove("running");
  conclude(question, answer, text, [ended, ...factsOf(facts)].filter(Boolean));
}

function take(chunk, answer, facts, began) {
  if (chunk.usage) facts.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  facts.finish = choice.finish_reason ?? facts.finish;
  const piece = choice.delta?.content ?? choice.delta?.refusal ?? "";
  if (!piece) return;
  facts.first ??= (performance.now() - began) / 1000;
  keepingBottom(() => answer.firstChild.appendData(piece));
}

function factsOf({ usage, first, seconds }) {
  if (!usage) return [];
  const { prompt_tokens: taken, completion_tokens: given } = usage;
  const rate = given > 1 && seconds > first ? ` · ${Math.round(given / seconds)} tokens/s` : "";
  return [`${taken} tokens in, ${given} out`, first === undefined ? "" : `first after ${first.toFixed(2)} s${rate}`];
}

// Without any answer the question was not asked: it goes back to where it can be changed.
function conclude(question, answer, text, facts) {
  if (!answer.isConnected) return; // cleared meanwhile
  const given = answer.textContent;
  if (given) {
    messages.push({ role: "user", content: text }, { role: "assistant", content: given });
  } else {
    answer.remove();
    if (!byId("message").value) byId("message").value = text;
    question.classList.add("failed");
  }
  const line = element("p", { className: "note facts", textContent: facts.join(" · ") });
  keepingBottom(() => (given ? answer : talk.lastChild).after(line));
}

function addTurn(kind, text) {
  const turn = element("p", { className: `turn ${kind}` }, document.createTextNode(text));
  talk.append(turn);
  talk.scrollTop = talk.scrollHeight;
  return turn;
}

function keepingBottom(change) {
  const atBottom = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
  change();
  if (atBottom) talk.scrollTop = talk.scrollHeight;
}

function showRunning(running) {
  const focused = document.activeElement;
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  talk.setAttribute("aria-busy", running);
  if (focused === byId("send") || focused === byId("stop")) byId(running ? "stop" : "message").focus();
}

// The snippets.

const SNIPPETS = {
  python: (name, token) => `from openai import OpenAI

client = OpenAI(
    base_url=${JSON.stringify(BASE_URL)},
    api_key=${JSON.stringify(token)},
)
stream = client.chat.completions.create(
    model=${JSON.stringify(name)},
    messages=[
        {"role": "user", "content": "Hello!"},
    ],
    stream=True,
)
for chunk in stream:
    text = chunk.choices[0].delta.content
    print(text or "", end="", flush=True)`,

  node: (name, token) => `import OpenAI from "openai";

const client = new OpenAI({
  baseURL: ${JSON.stringify(BASE_URL)},
  apiKey: ${JSON.stringify(token)},
});
const stream = await client.chat.completions.create({
  model: ${JSON.stringify(name)},
  messages: [
    { role: "user", content: "Hello!" },
  ],
  stream: true,
});
for await (const chunk of stream) {
  const text = chunk.choices[0].delta.content;
  process.stdout.write(text ?? "");
}`,

  curl: (name, token) => `curl -N \\
  ${quoted(`${BASE_URL}/chat/completions`)} \\
  -H "Authorization: Bearer ${token}" \\
  -H "Content-Type: application/json" \\
  -d ${quoted(`{
    "model": ${JSON.stringify(name)},
    "messages": [
      {"role": "user", "content": "Hello!"}
    ],
    "stream": true
  }`)}`,
};

const INSTALL = { python: "pip install openai", node: "npm install openai, then save it as chat.mjs", curl: "" };

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function showSnippet() {
  byId("snippet").textContent = SNIPPETS[language](model || "MODEL", keyless ? "unused" : "YOUR_KEY");
  byId("install").textContent = INSTALL[language];
}

function pick(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    other.setAttribute("aria-selected", other === tab);
    other.tabIndex = other === tab ? 0 : -1;
  }
  language = tab.id.replace("tab-", "");
  byId("snippet").setAttribute("aria-labelledby", tab.id);
  showSnippet();
}

async function copySnippet() {
  const button = byId("copy");
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("snippet")); // plain http elsewhere: browsers keep the clipboard to themselves
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// What people do.

function useKey() {
  const given = byId("key").value.trim();
  if (given) sessionStorage.setItem("key", given);
  else sessionStorage.removeItem("key");
  listModels();
}

function submit() {
  const text = byId("message").value.trim();
  if (!text || answering) return;
  if (byId("key").value.trim() !== key()) useKey();
  byId("message").value = "";
  ask(text);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return; // 229: Safari's IME
  event.preventDefault();
  submit();
});
byId("stop").addEventListener("click", () => answering?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
byId("clear").addEventListener("click", () => {
  answering?.abort();
  messages.length = 0;
  talk.replaceChildren(element("p", { id: "greeting" }));
  choose(model);
  byId("message").focus();
});
byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
byId("model-list").addEventListener("change", (event) => choose(event.target.value));
byId("copy").addEventListener("click", copySnippet);
document.querySelector("[role=tablist]").addEventListener("click", (event) => {
  if (event.target.role === "tab") pick(event.target);
});
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const next = tabs.at((tabs.indexOf(event.target) + step) % tabs.length);
  pick(next);
  next.focus();
});

byId("base-url").textContent = BASE_URL;
byId("key").value = key();
showSnippet();
listModels();
