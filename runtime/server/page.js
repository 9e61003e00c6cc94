"use strict";
const find = (id) => document.getElementById(id);
const log = find("log"), form = find("form"), prompt = find("prompt"), status = find("status");
const send = find("send"), stop = find("stop");
// Small models ramble at the API's default of 1.
const sampling = { temperature: 0.5, top_p: 0.95 };
let messages = [], running = null;

function show(role, text) {
  const element = document.createElement("p");
  element.className = "message " + role;
  element.textContent = text;
  log.append(element);
  element.scrollIntoView({ block: "nearest" });
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

async function answer() {
  const mine = messages;
  running = new AbortController();
  const shown = show("assistant", "");
  let text = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages: mine, stream: true, ...sampling }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      text += event.choices[0]?.delta?.content ?? "";
      shown.textContent = text;
      if (event.timings) {
        const { ttft_s, decode_tps } = event.timings;
        status.textContent = `first token ${ttft_s.toFixed(2)} s` +
          (decode_tps ? `, ${decode_tps.toFixed(1)} tokens/s` : "");
      }
      form.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name === "AbortError") status.textContent = "stopped";
    else show("fault", error.message).setAttribute("role", "alert");
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
stop.addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.replaceChildren();
  status.textContent = "";
  prompt.focus();
});
