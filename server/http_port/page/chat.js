// The conversation: sends it whole with every message, and shows the answer as it arrives.

import { Problem, openEvents } from "./events.js";

const element = (id) => document.getElementById(id);

const REASONS = {
  length: "cut at the limit of tokens",
  abort: "aborted",
  stop: "",
};

export class Chat {
  constructor() {
    this.messages = [];
    this.running = null;
    this.log = element("log");
    this.prompt = element("prompt");
    element("form").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    element("stop").addEventListener("click", () => this.stop());
    element("clear").addEventListener("click", () => this.clear());
    this.prompt.addEventListener("input", () => this.fit());
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
    });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape" && this.running) this.stop(); });
  }

  fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight + 2}px`;
  }

  stop() {
    this.running?.abort();
    this.prompt.focus();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.log.replaceChildren(this.empty);
    element("clear").disabled = true;
    this.prompt.focus();
  }

  /** Adds a message to the log and returns its parts. */
  show(kind, who) {
    const [box, name, text, meta] = ["div", "span", "div", "span"].map((tag) => document.createElement(tag));
    box.className = `message ${kind}`;
    [name.className, text.className, meta.className] = ["who", "text", "meta"];
    name.textContent = who;
    box.append(name, text, meta);
    if (element("empty")) { this.empty = element("empty"); this.empty.remove(); }
    this.log.append(box);
    this.scroll(true);
    return { box, text, meta };
  }

  scroll(always = false) {
    const behind = this.log.scrollHeight - this.log.clientHeight - this.log.scrollTop;
    if (always || behind < 80) this.log.scrollTop = this.log.scrollHeight;
  }

  body(text) {
    const system = element("system").value;
    const body = {
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...this.messages,
        { role: "user", content: text },
      ],
      temperature: Number(element("temperature").value) || 0,
      stream: true,
      stream_options: { include_usage: true },
    };
    if (this.model) body.model = this.model;
    if (element("max-tokens").value) body.max_tokens = Number(element("max-tokens").value);
    return body;
  }

  async send() {
    const text = this.prompt.value;
    if (!text || this.running) return;
    if (!element("form").reportValidity()) return;
    const controller = (this.running = new AbortController());
    const body = this.body(text);
    this.show("user", "You").text.textContent = text;
    this.prompt.value = "";
    this.fit();
    this.busy(true);
    const answer = this.show("answer busy", this.model || "Model");
    const begin = performance.now();
    const state = { text: "", first: null, usage: null, reason: null };
    let failure = null;
    try {
      await this.stream(body, controller.signal, state, answer);
    } catch (error) {
      failure = error;
    }
    answer.box.classList.remove("busy");
    this.running = null;
    this.busy(false);
    const seconds = (performance.now() - begin) / 1000;
    if (failure?.name === "AbortError") state.reason = "stopped";
    else if (failure) this.fail(failure, answer, state, text);
    answer.meta.textContent = this.summary(state, seconds);
    // A turn without an answer is left out: the model would see a question that nobody answered.
    if (state.text) this.messages.push({ role: "user", content: text }, { role: "assistant", content: state.text });
    element("clear").disabled = false;
    this.scroll();
  }

  async stream(body, signal, state, answer) {
    const begin = performance.now();
    const options = { method: "POST", body: JSON.stringify(body), signal };
    for await (const { data } of openEvents("v1/chat/completions", options)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem(chunk.error.message ?? String(chunk.error), 500);
      if (chunk.usage) state.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      if (choice.delta?.content) {
        state.first ??= performance.now() - begin;
        state.text += choice.delta.content;
        answer.text.append(choice.delta.content);
        this.scroll();
      }
      state.reason = choice.finish_reason ?? state.reason;
    }
    if (!state.reason) throw new Problem("The connection ended before the answer did. Send the message again.", 0);
  }

  fail(failure, answer, state, text) {
    if (!state.text) answer.box.remove();
    const error = this.show("error", "Error");
    error.text.textContent = failure.message;
    if (!this.prompt.value && !state.text) { this.prompt.value = text; this.fit(); }
  }

  summary(state, seconds) {
    const parts = [];
    const tokens = state.usage?.completion_tokens;
    if (state.first !== null) parts.push(`first token ${Math.round(state.first)} ms`);
    if (tokens) parts.push(`${tokens} tokens`, `${(tokens / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} tokens/s`);
    const reason = REASONS[state.reason] ?? state.reason;
    if (reason) parts.push(reason);
    return parts.join(" · ");
  }

  busy(is) {
    element("send").hidden = is;
    element("stop").hidden = !is;
    this.log.setAttribute("aria-busy", String(is));
  }
}
