// Connects the page to the server it came from: the live figures, the key and the state of the server.

import { Chat } from "./chat.js";
import { Problem, key, openEvents, useKey } from "./events.js";
import { Plot, latest, recentMean, short } from "./plots.js";

const element = (id) => document.getElementById(id);
const MAX_SAMPLES = 240;

class Live {
  constructor(chat) {
    this.chat = chat;
    this.samples = [];
    this.server = null;
    this.paused = false;
    this.plots = this.makePlots();
    element("plots").append(...this.plots.map((plot) => plot.element));
    this.tiles = new Map();
    this.tell("connecting", "connecting");
    this.draw();
    addEventListener("resize", () => this.draw());
    element("pause").addEventListener("click", () => {
      this.paused = !this.paused;
      element("pause").setAttribute("aria-pressed", String(this.paused));
      this.draw();
    });
    // A page in the background watches nothing and holds no stream.
    document.addEventListener("visibilitychange", () => this.restart());
    this.restart();
  }

  makePlots() {
    const latency = (name, rank) => ({ value: (sample) => sample[name]?.[rank] ?? null, name: rank });
    return [
      new Plot({
        title: "Batch", unit: "tokens a step", stacked: true,
        series: [
          { name: "decode", value: (sample) => sample.decode },
          { name: "prefill", value: (sample) => sample.prefill },
          { name: "padding", value: (sample) => sample.padding },
        ],
      }),
      new Plot({
        title: "Queue", unit: "requests", integer: true, bound: () => this.server?.max_num_seqs ?? null,
        series: [
          { name: "running", value: (sample) => sample.running },
          { name: "waiting", value: (sample) => sample.waiting },
          { name: "swapped", value: (sample) => sample.swapped },
        ],
      }),
      new Plot({
        title: "Page pool", unit: "pages", stacked: true, integer: true, bound: () => this.server?.num_pages ?? null,
        series: [
          { name: "used", value: (sample) => sample.pages_used },
          { name: "cached", value: (sample) => sample.pages_cached },
        ],
      }),
      new Plot({
        title: "Throughput", unit: "tokens a second",
        series: [
          { name: "generated", value: (sample) => sample.generation_rate },
          { name: "prefilled", value: (sample) => sample.prefill_rate },
        ],
      }),
      new Plot({ title: "Time to first token", unit: "ms", series: ["p50", "p95"].map((rank) => latency("first_token", rank)) }),
      new Plot({ title: "Between tokens", unit: "ms", series: ["p50", "p95", "p99"].map((rank) => latency("gap", rank)) }),
    ];
  }

  restart() {
    this.controller?.abort();
    this.controller = null;
    clearTimeout(this.timer);
    if (!document.hidden) this.follow();
  }

  async follow() {
    const controller = (this.controller = new AbortController());
    let wait = 2;
    try {
      for await (const { event, data } of openEvents("live", { signal: controller.signal })) {
        if (event === "server") this.introduce(JSON.parse(data));
        else if (event === "samples") this.add(JSON.parse(data));
      }
      if (this.state !== "failed") this.tell("lost", "not connected", "The server has ended the connection; trying again.");
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Problem)) throw error;
      wait = error.retrySeconds ?? wait;
      const states = { 401: ["locked", "key needed"], 403: ["hidden", "no live figures"] };
      this.tell(...(states[error.status] ?? ["lost", "not connected"]), error.message);
      if (error.status in states) return; // until another key is given
    } finally {
      controller.abort();
    }
    if (this.controller === controller) this.timer = setTimeout(() => this.restart(), 1000 * wait);
  }

  introduce(server) {
    if (this.server && this.server.model !== server.model) this.samples = [];
    this.server = server;
    this.chat.model = server.model;
    document.title = `${server.model} · jaxserve`;
    element("served").textContent =
      `${server.model} · context ${server.max_model_len.toLocaleString("en-US")} tokens · ${server.platform} · version ${server.version}`;
  }

  add(samples) {
    // After a reconnection the history comes again.
    const newest = this.samples.length ? this.samples[this.samples.length - 1].time : 0;
    this.samples.push(...samples.filter((sample) => sample.time > newest));
    this.samples.splice(0, Math.max(this.samples.length - MAX_SAMPLES, 0));
    const { state } = samples[samples.length - 1];
    const notices = {
      starting: "The model is being loaded. This page goes on by itself when the server is ready.",
      draining: "The server finishes what it has and takes nothing new.",
      failed: "The engine has failed; the server's log says why. Start the server again.",
      ready: this.server && !this.server.can_chat
        ? "This model has no chat template: chat is not possible, completions are (python -m jaxserve.client)." : "",
    };
    this.tell(state, state, notices[state]);
    if (!this.paused) this.draw();
  }

  tell(state, text, notice = "") {
    if (state !== this.state) {
      element("state").dataset.state = state;
      element("state-text").textContent = text;
      this.state = state;
    }
    const box = element("notice");
    if (box.textContent !== notice) box.textContent = notice;
    box.hidden = !notice;
    element("send").disabled = !["ready", "connecting", "lost", "hidden"].includes(state) || this.server?.can_chat === false;
  }

  draw() {
    const last = this.samples.length ? this.samples[this.samples.length - 1] : null;
    const server = this.server;
    const pages = last ? last.pages_used + last.pages_cached + last.pages_free : 0;
    const latency = (name, value) => {
      const milliseconds = latest(this.samples, (sample) => sample[value]?.p50 ?? null);
      const large = milliseconds !== null && milliseconds >= 9999.5;
      this.tile(name, short(large ? milliseconds / 1000 : milliseconds), large ? "s" : "ms");
    };
    this.tile("Generated", short(recentMean(this.samples, (sample) => sample.generation_rate)), "tok/s");
    this.tile("Running", short(last?.running), server ? `of ${short(server.max_num_seqs)}` : "");
    this.tile("Waiting", short(last?.waiting), server ? `of ${short(server.max_num_waiting)}` : "");
    this.tile("Pages used", last && pages ? short((100 * last.pages_used) / pages) : "–", "%");
    const sum = (value) => this.samples.reduce((total, sample) => total + (sample[value] ?? 0), 0);
    const lookedUp = sum("prefix_queries");
    this.tile("Prefix hits", lookedUp ? short((100 * sum("prefix_hits")) / lookedUp) : "–", "%");
    latency("First token, p50", "first_token");
    latency("Token gap, p50", "gap");
    for (const plot of this.plots) plot.draw(this.samples);
  }

  tile(name, value, unit) {
    let tile = this.tiles.get(name);
    if (!tile) {
      const [box, term, number, small] = ["div", "dt", "dd", "small"].map((tag) => document.createElement(tag));
      box.className = "tile";
      term.textContent = name;
      const figure = document.createTextNode("");
      number.append(figure, small);
      box.append(term, number);
      element("tiles").append(box);
      tile = { figure, small };
      this.tiles.set(name, tile);
    }
    tile.figure.data = value + " ";
    tile.small.textContent = unit;
  }
}

function manageKey(live) {
  const dialog = element("key-dialog");
  const use = (value) => {
    useKey(value);
    dialog.close();
    live.restart();
  };
  element("key-button").addEventListener("click", () => { element("key").value = key(); dialog.showModal(); });
  element("key-form").addEventListener("submit", (event) => { event.preventDefault(); use(element("key").value.trim()); });
  element("key-forget").addEventListener("click", () => use(""));
  element("key-cancel").addEventListener("click", () => dialog.close());
}

manageKey(new Live(new Chat()));
