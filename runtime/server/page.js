"use strict";
const find = (id) => document.getElementById(id);
const log = find("log"), form = find("form"), prompt = find("prompt"), status = find("status"), model = find("model");
const send = find("send"), stop = find("stop");
const SAMPLES = 60, PERIOD_MS = 1000;
let messages = [], running = null;

// Chat

function show(role, text) {
  const element = document.createElement("p");
  element.className = "message " + role;
  element.textContent = text;
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return element;
}

function busy(on) {
  send.disabled = on;
  stop.disabled = !on;
  log.setAttribute("aria-busy", String(on));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function wanted() {
  const body = { stream: true, messages: [...messages] };
  const system = find("system").value.trim();
  if (system) body.messages.unshift({ role: "system", content: system });
  if (model.value) body.model = model.value;
  for (const name of ["temperature", "top_p", "repetition_penalty", "max_tokens", "seed"]) {
    const field = find(name);
    if (!field.checkValidity()) throw new Error(`${name}: ${field.validationMessage}`);
    if (field.value !== "") body[name] = Number(field.value);
  }
  return body;
}

async function answer() {
  const mine = messages;
  running = new AbortController();
  const shown = show("assistant", "");
  const started = performance.now();
  let text = "", begun = 0;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(wanted()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      text += event.choices[0]?.delta?.content ?? "";
      if (text && !begun) {
        begun = (performance.now() - started) / 1000;
        plot("ttft", begun, begun.toFixed(2));
        status.textContent = `first token ${begun.toFixed(2)} s`;
      }
      shown.textContent = text;
      if (follows) log.scrollTop = log.scrollHeight;
      if (event.timings) answered(event.timings, begun);
    }
  } catch (error) {
    if (error.name === "AbortError") status.textContent = "stopped";
    else { status.textContent = ""; show("fault", error.message).setAttribute("role", "alert"); }
  } finally {
    if (text) mine.push({ role: "assistant", content: text });
    else { shown.remove(); mine.pop(); }
    running = null;
    busy(false);
    prompt.focus();
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running) return;
  messages.push({ role: "user", content: text });
  show("user", text);
  prompt.value = "";
  status.textContent = "…";
  busy(true);
  answer();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
stop.addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.replaceChildren();
  status.textContent = "";
  prompt.focus();
});

// Figures

const curve = find("curve").content, SVG = curve.querySelector("svg").namespaceURI;
const series = {}, measured = { prefill_tps: [], decode_tps: [] };
let before = null, cards = [], peak_bytes = 0;

function piece(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

for (const figure of document.querySelectorAll("figure")) {
  const caption = figure.firstElementChild;
  caption.id = `${figure.id}-name`;
  figure.append(curve.cloneNode(true));
  figure.querySelector("output").setAttribute("aria-labelledby", caption.id);
}

function tell(id, text) {
  find(id).hidden = false;
  find(id).querySelector("output").textContent = text;
}

/** Add a value to a curve; its top is the highest value seen in the window, or `top`. */
function plot(id, value, text, top = 0) {
  const values = (series[id] ??= []);
  values.push(value);
  if (values.length > SAMPLES) values.shift();
  const highest = Math.max(top, ...values) || 1;
  const x = (index) => (100 * (SAMPLES - values.length + index)) / (SAMPLES - 1);
  const points = values.map((item, index) => `${x(index).toFixed(1)} ${(29 - (28 * item) / highest).toFixed(1)}`);
  const line = `M${points.join("L")}` + (points.length > 1 ? "" : "h0.01");
  find(id).querySelector("svg").replaceChildren(
    piece("path", { class: "area", d: `${line}L100 30L${x(0).toFixed(1)} 30Z` }),
    piece("path", { class: "curve", d: line }),
  );
  tell(id, text);
}

const megabytes = (bytes) => (bytes < 1e10 ? `${(bytes / 1e6).toFixed(0)} MB` : `${(bytes / 1e9).toFixed(0)} GB`);
const rate = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
const middle = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

/** What has no file behind it by process, and the mapped files of both, as one bar. */
function drawMemory({ server, engine, available_bytes }) {
  const files = server.file_bytes + (engine?.file_bytes ?? 0);
  const shares = [["server", server.anonymous_bytes], ["engine", engine?.anonymous_bytes ?? 0], ["files", files]];
  const all = shares.reduce((sum, [, bytes]) => sum + bytes, 0);
  let x = 0;
  const bars = shares.map(([name, bytes]) => {
    const width = (100 * bytes) / all;
    const bar = piece("rect", { class: name, x, y: 6, width, height: 18 });
    x += width;
    return bar;
  });
  find("memory").querySelector("svg").replaceChildren(...bars);
  tell("memory", shares.map(([, bytes]) => (bytes / 1e6).toFixed(0)).join(" + ") + " MB");
  find("memory-name").textContent = "RAM: server + engine + files" + (available_bytes ? `, ${megabytes(available_bytes)} free` : "");
  const held = (process) => process?.pss_bytes ?? process?.rss_bytes ?? 0;
  peak_bytes = Math.max(peak_bytes, held(server) + held(engine));
}

function draw(now) {
  const { running: computing, queued } = now.requests;
  if (before) {
    const elapsed = now.time_s - before.time_s;
    for (const kind of ["decode", "prefill"]) {
      const value = Math.max(0, (now.tokens[kind] - before.tokens[kind]) / elapsed);
      plot(kind, value, rate(value));
    }
  }
  before = now;
  drawMemory(now.memory);
  if (now.kv) plot("kv", now.kv.tokens, `${now.kv.tokens} of ${now.kv.capacity_tokens}`, now.kv.capacity_tokens);
  plot("queue", computing + queued, `${computing} + ${queued}`, 2);
  const { temperature_c, clock_mhz, throttled } = now.machine;
  if (temperature_c != null) {
    plot("heat", temperature_c, temperature_c.toFixed(0) + (throttled?.length ? `, ${throttled.join(", ")}` : ""), 90);
  }
  if (clock_mhz != null) plot("clock", clock_mhz, clock_mhz.toFixed(0));
}

function answered({ prefill_tps, decode_tps }, first_s) {
  for (const [name, value] of Object.entries({ prefill_tps, decode_tps })) if (value) measured[name].push(value);
  status.textContent = `first token ${first_s.toFixed(2)} s` + (decode_tps ? `, ${rate(decode_tps)} tokens/s` : "");
  drawCard();
}

// The model's card

function row(cells) {
  const line = document.createElement("tr");
  cells.forEach((text, index) => {
    const cell = document.createElement(index ? "td" : "th");
    if (!index) cell.scope = "row";
    cell.textContent = text;
    line.append(cell);
  });
  return line;
}

function drawCard() {
  const chosen = cards.find((card) => card.name === model.value);
  if (!chosen) return;
  const told = Object.entries(chosen.facts).flatMap(([name, value]) => {
    const pair = [document.createElement("dt"), document.createElement("dd")];
    pair[0].textContent = name;
    pair[1].textContent = value;
    return pair;
  });
  find("facts").replaceChildren(...told);
  const { target, ram_bytes, prefill_tps, decode_tps } = chosen.predicted ?? {};
  find("target").textContent = target ? `Predicted for ${target}, measured here` : "Measured here";
  const number = (value, format) => (value ? format(value) : "–");
  find("compared").replaceChildren(
    row(["Decode, tokens/s", number(decode_tps, rate), number(middle(measured.decode_tps), rate)]),
    row(["Prefill, tokens/s", number(prefill_tps, rate), number(middle(measured.prefill_tps), rate)]),
    row(["RAM", number(ram_bytes, megabytes), number(peak_bytes, megabytes)]),
  );
}

function drawModels(now) {
  cards = now.models;
  const names = cards.filter((card) => card.generates).map((card) => card.name);
  if (names.join("\n") !== [...model.options].map((option) => option.value).join("\n")) {
    const chosen = model.value;
    model.replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(chosen)) model.value = chosen;
    document.title = `${model.value} · EdgeLM`;
    model.disabled = names.length < 2;
  }
  const state = cards.find((card) => card.name === model.value)?.state ?? now.state;
  if (find("state").textContent !== state) find("state").textContent = state;
  drawCard();
}

model.addEventListener("change", () => {
  measured.prefill_tps = [];
  measured.decode_tps = [];
  peak_bytes = 0;
  document.title = `${model.value} · EdgeLM`;
  drawCard();
});

async function look() {
  try {
    if (!document.hidden) {
      const response = await fetch("status", { signal: AbortSignal.timeout(5000) });
      if (!response.ok) throw new Error(String(response.status));
      const now = await response.json();
      draw(now);
      drawModels(now);
    }
  } catch {
    find("state").textContent = "no answer";
  }
  setTimeout(look, PERIOD_MS);
}
look();
