// Line charts as SVG: axes, lines, a band and level lines; the values under the pointer or the arrow keys.

import { make } from "./views.js";

const SPACE = "http://www.w3.org/2000/svg";

/** Make an SVG element. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return round numbers from low to high, about `number` of them. */
export function ticks(low, high, number) {
  if (!(high > low)) return [low];
  const raw = (high - low) / number, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** Format a step: 1200 as 1,200, 120000 as 120k. */
const short = (x) => (x >= 10000 ? `${(x / 1000).toLocaleString("en")}k` : x.toLocaleString("en"));

/** Return the range of the values to show: a few outliers at the start of a training do not flatten the rest. */
export function range(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  if (!sorted.length) return [0, 1];
  const low = sorted[0], high = sorted[Math.min(sorted.length - 1, Math.ceil(0.98 * sorted.length))];
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - margin, high + margin];
}

/**
 * A chart. `show({lines, levels, band})`: lines [{name, points: [[x, y], ...], kind}], levels [{name, value}], band
 * [low, high] with a name, unit: of the values, above the axis. label: what it shows, for a screen reader; the values are also in a table.
 */
export class LineChart {
  constructor(label, { height = 300 } = {}) {
    Object.assign(this, { label, height, data: { lines: [], levels: [], band: null }, at: null, width: 0 });
    this.svg = draw("svg", { role: "img", tabindex: 0, "aria-label": label });
    this.legend = make("ul", { className: "legend" });
    this.readout = make("p", { className: "readout", attributes: { "aria-live": "polite" } });
    this.element = make("figure", { className: "chart" }, this.svg, this.legend, this.readout);
    this.svg.addEventListener("pointermove", (event) => this.point(event.clientX - this.svg.getBoundingClientRect().left));
    this.svg.addEventListener("pointerleave", () => this.select(null));
    this.svg.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => { if (this.element.clientWidth !== this.width) this.render(); }).observe(this.element);
  }

  show(data) {
    this.data = { levels: [], band: null, unit: "", ...data };
    this.render();
  }

  /** All steps at which a line has a value. */
  get steps() {
    return [...new Set(this.data.lines.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
  }

  render() {
    this.width = this.element.clientWidth;
    if (!this.width) return;
    const { width, height } = this, { lines, levels, band } = this.data;
    const left = 52, right = 12, top = 26, bottom = 44;
    const all = lines.flatMap(({ points }) => points);
    const last = Math.max(1, this.data.end ?? 0, ...all.map(([x]) => x));
    const [low, high] = range([...all.map(([, y]) => y), ...levels.map(({ value }) => value), ...(band?.values ?? [])]);
    this.x = (step) => left + (step / last) * (width - left - right);
    this.y = (value) => top + ((high - Math.min(high, Math.max(low, value))) / (high - low)) * (height - top - bottom);
    this.area = { left, right: width - right, top, bottom: height - bottom };
    const parts = [];
    for (const value of ticks(low, high, 5)) {
      parts.push(draw("line", { class: "grid", x1: left, x2: width - right, y1: this.y(value), y2: this.y(value) }),
        draw("text", { class: "tick", x: left - 6, y: this.y(value) + 4, "text-anchor": "end" }, String(value)));
    }
    for (const step of ticks(0, last, Math.max(2, Math.floor(width / 110)))) {
      parts.push(draw("text", { class: "tick", x: Math.min(this.x(step), width - right - 8), y: height - 26, "text-anchor": "middle" }, short(step)));
    }
    parts.push(draw("text", { class: "title", x: 4, y: 13 }, this.data.unit),
      draw("text", { class: "title", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "step"));
    if (band) {
      const [from, to] = band.values;
      const start = left + 0.85 * (width - left - right); // it is for the end
      parts.push(draw("rect", { class: "band", x: start, width: width - right - start, y: this.y(to), height: Math.max(1, this.y(from) - this.y(to)) }));
    }
    for (const { value } of levels) {
      parts.push(draw("line", { class: "level", x1: left, x2: width - right, y1: this.y(value), y2: this.y(value) }));
    }
    lines.forEach(({ points, kind }, i) => {
      if (!points.length) return;
      const path = points.map(([x, y], n) => `${n ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
      parts.push(draw("path", { class: `line line-${i % 8} ${kind ?? ""}`, d: path }));
      if (points.length === 1 || kind === "dots") {
        parts.push(...points.map(([x, y]) => draw("circle", { class: `dot line-${i % 8}`, cx: this.x(x), cy: this.y(y), r: 3 })));
      }
    });
    this.cursor = draw("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
    parts.push(this.cursor);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren(...parts);
    this.svg.setAttribute("aria-label", [this.label, ...this.summary()].join(". "));
    const entry = (name, kind) => make("li", { className: kind, textContent: name });
    this.legend.replaceChildren(...lines.map(({ name, kind }, i) => entry(name, `line-${i % 8} ${kind ?? ""}`)),
      ...levels.map(({ name }) => entry(name, "level")), ...(band ? [entry(band.name, "band")] : []));
    this.select(this.at);
  }

  /** Sentences about the chart. */
  summary() {
    return this.data.lines.filter(({ points }) => points.length).map(({ name, points }) =>
      `${name}: ${points[0][1].toFixed(3)} at step ${points[0][0]}, ${points.at(-1)[1].toFixed(3)} at step ${points.at(-1)[0]}`);
  }

  point(pixel) {
    const steps = this.steps;
    if (!steps.length || !this.x) return;
    this.select(steps.reduce((best, step) => (Math.abs(this.x(step) - pixel) < Math.abs(this.x(best) - pixel) ? step : best)));
  }

  move(event) {
    const steps = this.steps, now = steps.indexOf(this.at);
    const to = { ArrowRight: now + 1, ArrowLeft: now < 0 ? steps.length - 1 : now - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") this.select(null);
    if (to === undefined || !steps.length) return;
    event.preventDefault();
    this.select(steps[Math.max(0, Math.min(steps.length - 1, to))]);
  }

  /** Show the values at a step: of each line its last value up to there. */
  select(step) {
    this.at = step;
    if (step === null || !this.x || !this.cursor) {
      this.cursor?.setAttribute("visibility", "hidden");
      this.readout.textContent = "";
      return;
    }
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(step));
    this.cursor.setAttribute("visibility", "visible");
    const values = this.data.lines.flatMap(({ name, points }) => {
      const value = points.findLast(([x]) => x <= step);
      return value ? [`${name} ${value[1].toFixed(4)}`] : [];
    });
    this.readout.textContent = `step ${step.toLocaleString("en")}: ${values.join(", ")}${this.data.unit ? ` ${this.data.unit}` : ""}`;
  }
}
