// Draws plots over time as SVG, from plain numbers. Knows nothing of the server.

const SVG = "http://www.w3.org/2000/svg";
const CLASSES = ["one", "two", "three"];
const GAP_SECONDS = 5; // a line goes on across fewer seconds without a value
const LEFT = 40, RIGHT = 4, TOP = 8, BOTTOM = 20;

function svg(name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return element;
}

/** Formats a number for an axis or a legend. */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 999.5e3) return trimmed(value / 1e6) + "M";
  if (size >= 9999.5) return trimmed(value / 1e3) + "k";
  if (size >= 100) return Math.round(value).toLocaleString("en-US");
  return trimmed(value);
}

function trimmed(value) {
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return String(Number(value.toFixed(digits)));
}

const STEPS = [1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10];

/** The least of STEPS times a power of ten that is not below the value. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * STEPS.find((step) => step * power >= value * 0.999);
}

/**
 * A figure with a title, a plot and a legend with the newest values.
 *
 * series: [{name, value(sample)}]; a value of null is a gap. stacked: areas on one another, else lines.
 * bound: () => a value that the axis shows as a limit, or null. integer: the axis has no fractions.
 */
export class Plot {
  constructor({ title, unit, series, stacked = false, bound = () => null, integer = false, seconds = 120 }) {
    Object.assign(this, { title, series, stacked, bound, integer, seconds });
    this.element = document.createElement("figure");
    this.element.className = "plot";
    const head = document.createElement("h3");
    head.textContent = title + " ";
    const small = document.createElement("small");
    small.textContent = unit;
    head.append(small);
    this.unit = unit;
    this.picture = svg("svg", { role: "img" });
    this.legend = document.createElement("ul");
    this.legend.className = "legend";
    this.values = series.map(({ name }, index) => {
      const item = document.createElement("li");
      const mark = svg("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" });
      mark.append(stacked
        ? svg("rect", { class: "area " + CLASSES[index], x: 4, y: 1, width: 12, height: 10, rx: 2 })
        : svg("path", { class: "line " + CLASSES[index], d: "M1 6H21" }));
      const value = document.createElement("b");
      item.append(mark, name, value);
      this.legend.append(item);
      return value;
    });
    this.element.append(head, this.picture, this.legend);
  }

  draw(samples) {
    const box = this.picture.getBoundingClientRect();
    const width = Math.max(box.width, 120), height = Math.max(box.height, 80);
    const newest = samples.length ? samples[samples.length - 1] : null;
    const now = newest ? newest.time : 0;
    const shown = samples.filter((sample) => sample.time >= now - this.seconds);
    const columns = shown.map((sample) => this.series.map(({ value }) => value(sample)));
    const stacks = this.stacked ? columns.map(sums) : columns;
    const largest = Math.max(0, ...stacks.flat().filter((value) => value !== null));
    const bound = this.bound();
    // A limit far above what happens would flatten it.
    const showsBound = bound !== null && bound <= 4 * largest;
    const top = ceiling(Math.max(showsBound ? bound : 0, largest, this.integer ? 2 : 1e-3));
    const x = (sample) => LEFT + (width - LEFT - RIGHT) * (1 - (now - sample.time) / this.seconds);
    const y = (value) => TOP + (height - TOP - BOTTOM) * (1 - value / top);

    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = Math.round(y(top * share));
      parts.push(svg("path", { class: "grid", d: `M${LEFT} ${at}H${width - RIGHT}` }));
      parts.push(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, short(top * share)));
    }
    const minutes = this.seconds / 60;
    parts.push(svg("text", { x: LEFT, y: height - 4 }, `${minutes} min ago`));
    parts.push(svg("text", { x: width - RIGHT, y: height - 4, "text-anchor": "end" }, "now"));
    if (this.stacked) parts.push(...this.areas(shown, stacks, x, y));
    else parts.push(...this.lines(shown, columns, x, y));
    if (showsBound) parts.push(svg("path", { class: "bound", d: `M${LEFT} ${y(bound)}H${width - RIGHT}` }));
    if (!columns.some((column) => column.some((value) => value))) {
      parts.push(svg("text", { class: "nothing", x: (LEFT + width) / 2, y: height / 2 - 4 }, "nothing in the last two minutes"));
    }
    this.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.picture.replaceChildren(...parts);

    const last = this.series.map(({ value }) => latest(shown, value));
    this.values.forEach((element, index) => { element.textContent = short(last[index]); });
    const said = this.series.map(({ name }, index) => `${name} ${short(last[index])}`).join(", ");
    this.picture.setAttribute("aria-label", `${this.title}, ${this.unit}: ${said} now, at most ${short(largest)} in ${minutes} minutes`);
  }

  areas(shown, stacks, x, y) {
    if (shown.length < 2) return [];
    return this.series.map((_, index) => {
      const upper = shown.map((sample, at) => `${x(sample).toFixed(1)} ${y(stacks[at][index]).toFixed(1)}`);
      const lower = shown.map((sample, at) => `${x(sample).toFixed(1)} ${y(index ? stacks[at][index - 1] : 0).toFixed(1)}`);
      return svg("path", { class: "area " + CLASSES[index], d: `M${upper.join("L")}L${lower.reverse().join("L")}Z` });
    });
  }

  lines(shown, columns, x, y) {
    return this.series.map((_, index) => {
      let path = "", before = -Infinity;
      shown.forEach((sample, at) => {
        const value = columns[at][index];
        if (value === null) return;
        const point = `${x(sample).toFixed(1)} ${y(value).toFixed(1)}`;
        // A point of its own between two gaps is a dot.
        path += sample.time - before <= GAP_SECONDS ? `L${point}` : `M${point}h0.01`;
        before = sample.time;
      });
      return svg("path", { class: "line " + CLASSES[index], d: path || "M0 0" });
    }).reverse();
  }
}

/** The newest value of the last few seconds, or null. */
export function latest(samples, value) {
  const now = samples.length ? samples[samples.length - 1].time : 0;
  for (let at = samples.length - 1; at >= 0 && now - samples[at].time <= GAP_SECONDS; at--) {
    const found = value(samples[at]);
    if (found !== null) return found;
  }
  return null;
}

/** The mean of the last few seconds, or null. */
export function recentMean(samples, value) {
  const now = samples.length ? samples[samples.length - 1].time : 0;
  const found = samples.filter((sample) => now - sample.time <= GAP_SECONDS).map(value);
  return found.length ? found.reduce((sum, one) => sum + one, 0) / found.length : null;
}

function sums(values) {
  let sum = 0;
  return values.map((value) => (sum += value ?? 0));
}
