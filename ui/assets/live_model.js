// What the browser knows of one run: series, clock, telemetry, events; filled by the feed's answers, drawn by charts.js.
// Everything is append-only between two resets, so that a chart can draw just what it has not drawn yet.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});

  const ENDS = new Set(["paused", "stopped", "finished", "failed", "diverged"]);
  const LIVE = new Set(["preparing", "running", "pausing", "stopping"]);
  const WORDS = { nan: NaN, inf: Infinity, "-inf": -Infinity };

  /** A number off the wire: NaN and infinity travel as words, absent ones as null. */
  function number(value) {
    if (value === null || value === undefined) return NaN;
    return typeof value === "number" ? value : WORDS[value] ?? NaN;
  }

  /** Index of the last entry of the sorted array `sorted` that is <= value; -1 where there is none. */
  function lastAtOrBefore(sorted, value) {
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  function between(xs, ys, value) {
    const at = lastAtOrBefore(xs, value);
    if (at < 0) return ys.length ? ys[0] : NaN;
    if (at >= xs.length - 1) return ys[ys.length - 1];
    const share = (value - xs[at]) / (xs[at + 1] - xs[at] || 1);
    return ys[at] + share * (ys[at + 1] - ys[at]);
  }

  /** Exponential mean over steps with the start bias taken out; a gap of d steps fades the past by d steps. */
  class Smoother {
    constructor(span) {
      this.fade = 1 - 1 / Math.max(span, 1);
      this.sum = 0;
      this.weight = 0;
      this.step = null;
    }

    next(step, value) {
      if (!Number.isFinite(value)) return NaN;
      const kept = this.step === null ? 0 : this.fade ** Math.max(step - this.step, 1);
      this.sum = kept * this.sum + (1 - kept) * value;
      this.weight = kept * this.weight + (1 - kept);
      this.step = step;
      return this.sum / this.weight;
    }
  }

  class Model {
    constructor() {
      this.span = 10;
      this.status = {};
      this.fast = {};
      this.clear();
    }

    /** Forget all points and events; the status stays until the next answer. */
    clear() {
      this.series = {};
      this.mean = { x: [], y: [] };
      this.clock = { x: [], y: [] };
      this.heat = {};
      this.events = [];
      this.pauses = [];
      this.smooth(this.span);
    }

    /** Choose over how many steps the smoothed line averages (1 = not at all). */
    smooth(span) {
      this.span = span;
      this.smoother = new Smoother(span);
      this.smoothed = { x: [], y: [] };
      this.extendSmoothed();
    }

    /** Take in one answer of the feed; returns whether everything was replaced, and the new events. */
    apply(answer) {
      if (answer.s) this.status = answer.s;
      if (answer.reset) this.clear();
      const { gen, now, state, phase = null, done = null, of = null, step, total = null, speed = null } = answer;
      this.fast = { gen, now, state, phase, done, of, step, total, speed: number(speed), eta_s: answer.eta_s ?? null };
      if (answer.history) this.takeHistory(answer.history);
      if (answer.m) this.takeSteps(answer.m);
      if (answer.t) this.takeSamples(answer.t);
      const events = answer.e ?? [];
      for (const event of events) this.takeEvent(event);
      return { reset: Boolean(answer.reset), events };
    }

    takeHistory({ m, t }) {
      for (const [name, [x, y]] of Object.entries(m)) {
        const series = { x: x.slice(), y: y.map(number) };
        if (name === "mean") this.mean = series;
        else if (name === "clock") this.clock = series;
        else this.series[name] = series;
      }
      for (const [name, [x, y]] of Object.entries(t)) this.heat[name] = { x: x.slice(), y: y.map(number) };
      this.smooth(this.span);
    }

    takeSteps(columns) {
      const steps = columns.step;
      for (const [name, values] of Object.entries(columns)) {
        if (name === "step") continue;
        const target = name === "t" ? this.clock : (this.series[name] ??= { x: [], y: [] });
        steps.forEach((step, i) => {
          target.x.push(step);
          target.y.push(number(values[i]));
        });
      }
      steps.forEach((step, i) => {
        this.mean.x.push(step);
        this.mean.y.push(number(columns.loss[i]));
      });
      this.extendSmoothed();
    }

    takeSamples(columns) {
      for (const [name, values] of Object.entries(columns)) {
        if (name === "t") continue;
        const target = (this.heat[name] ??= { x: [], y: [] });
        columns.t.forEach((t, i) => {
          target.x.push(t);
          target.y.push(number(values[i]));
        });
      }
    }

    takeEvent(event) {
      event.at = event.t - (this.status.t0 ?? event.t);
      if (event.kind === "resumed" && this.events.length) {
        const ended = this.events.findLast((e) => ENDS.has(e.kind) || e.kind === "resumed" || e.kind === "started");
        const sign = ended && ENDS.has(ended.kind) ? ended.at : this.lastSignBefore(event.at);
        if (event.at - sign > 1) this.pauses.push([sign, event.at]);
      }
      this.events.push(event);
    }

    lastSignBefore(at) {
      const times = this.heat.process_gib?.x ?? [];
      const i = lastAtOrBefore(times, at - 0.5);
      return i < 0 ? at : times[i];
    }

    extendSmoothed() {
      for (let i = this.smoothed.x.length; i < this.mean.x.length; i++) {
        this.smoothed.x.push(this.mean.x[i]);
        this.smoothed.y.push(this.smoother.next(this.mean.x[i], this.mean.y[i]));
      }
    }

    get isLive() {
      return LIVE.has(this.fast.state);
    }

    /** More points than a screen can show: time to ask for the thinned history again. */
    get isHeavy() {
      return (this.series.loss?.x.length ?? 0) > 6000 || (this.heat.process_gib?.x.length ?? 0) > 6000;
    }

    of(...kinds) {
      return this.events.filter((event) => kinds.includes(event.kind));
    }

    latest(kind) {
      return this.events.findLast((event) => event.kind === kind) ?? null;
    }

    last(series) {
      return series && series.y.length ? series.y[series.y.length - 1] : NaN;
    }

    /** Seconds between the last steps; 0 while there are too few to say. */
    secondsAStep() {
      const { x, y } = this.clock, last = x.length - 1, from = Math.max(last - 20, 0);
      return last > 0 ? (y[last] - y[from]) / (x[last] - x[from] || 1) : 0;
    }

    /** Highest value of a telemetry column over the whole run. */
    peak(name) {
      return (this.heat[name]?.y ?? []).reduce((high, value) => (value > high || Number.isNaN(high) ? value : high), NaN);
    }

    /** How the loss moved over the last 100 steps, each end the mean of 25; null before there are 30 steps. */
    change() {
      const { x, y } = this.mean;
      const last = x[x.length - 1], from = Math.max(last - 100, x[0] + 24);
      const level = (until) => {
        const part = y.slice(lastAtOrBefore(x, until - 25) + 1, lastAtOrBefore(x, until) + 1).filter(Number.isFinite);
        return part.reduce((sum, value) => sum + value, 0) / part.length;
      };
      const difference = level(last) - level(from);
      if (!(last - x[0] >= 30) || !Number.isFinite(difference)) return null;
      if (Math.abs(difference) < 0.005) return `level over ${last - from} steps`;
      const sign = difference < 0 ? "−" : "+";
      return `${sign}${Math.abs(difference).toFixed(2)} in ${last - from} steps`;
    }

    /** Held-out against training loss, and whether it is the best so far. */
    gap() {
      const { held_out: heldOut, best, best_step: step } = this.status;
      const gap = number(heldOut) - this.last(this.smoothed);
      const parts = Number.isFinite(gap) ? [`gap ${gap < 0 ? "−" : ""}${Math.abs(gap).toFixed(2)}`] : [];
      if (heldOut === best) parts.push("best so far");
      else if (best !== null && best !== undefined) parts.push(`best ${number(best).toFixed(3)} at step ${step}`);
      return parts.join(", ");
    }

    /** The median speed of all steps, tokens a second; NaN before the first. */
    middleSpeed() {
      const speeds = (this.series.speed?.y ?? []).filter(Number.isFinite).toSorted((a, b) => a - b);
      return speeds.length ? speeds[speeds.length >> 1] : NaN;
    }

    /** Whether the speed holds: {text, tone}; a step that takes five times as long as usual is said. */
    pace() {
      const speeds = (this.series.speed?.y ?? []).filter(Number.isFinite);
      const quiet = (this.fast.now ?? 0) - (this.clock.y[this.clock.y.length - 1] ?? Infinity);
      if (this.fast.phase === "train" && quiet > Math.max(5 * this.secondsAStep(), 10)) {
        return { text: `no step for ${signalbox.numbers.duration(quiet)}`, tone: "warn" };
      }
      if (speeds.length < 20) return { text: "", tone: "" };
      const share = speeds.slice(-10).reduce((sum, value) => sum + value, 0) / 10 / this.middleSpeed() - 1;
      if (Math.abs(share) < 0.1) return { text: "steady", tone: "" };
      return { text: `${Math.round(Math.abs(share) * 100)} % ${share < 0 ? "slower" : "faster"} than usual`, tone: "" };
    }

    /** When training began (seconds since the run was made): the zero of both axes. */
    get began() {
      const running = this.events.find((event) => event.kind === "running");
      return running ? running.at : this.clock.y[0] ?? Infinity;
    }

    /** Seconds of work up to time `t`: the pauses before it are cut out. */
    worked(t) {
      let cut = 0;
      for (const [from, to] of this.pauses) cut += Math.max(0, Math.min(t, to) - from);
      return t - cut;
    }

    timeOf(step) {
      return between(this.clock.x, this.clock.y, step);
    }

    /** The step being trained at time `t`, as a fraction; NaN before training began. */
    stepAt(t) {
      const { x, y } = this.clock;
      if (t < this.began || !x.length) return NaN;
      if (t < y[0]) return (x[0] * (t - this.began)) / (y[0] - this.began || 1);
      const last = x.length - 1;
      if (t <= y[last]) return between(y, x, t);
      // the step under way: never drawn as if it were done
      const pace = last > 0 ? (y[last] - y[0]) / (x[last] - x[0] || 1) : 1;
      return x[last] + Math.min((t - y[last]) / (pace || 1), 0.95);
    }
  }

  signalbox.RunModel = Model;
  signalbox.number = number;
  signalbox.lastAtOrBefore = lastAtOrBefore;
})();
