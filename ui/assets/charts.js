// The charts of a run: drawn once, then only extended; zoom, theme and axis are kept by the View that all of them share.
// Needs window.Plotly (the file of the plotly wheel) and live_model.js.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});

  const MARGIN = { l: 44, r: 12, t: 10, b: 24 };
  const UNITS = [["s", 1, 180], ["min", 60, 10_800], ["h", 3600, Infinity]];
  const BREAKS = { oom_rung: "out of memory", rewind: "went back", diverged: "diverged", failed: "failed" };
  const FEW = 40; // up to here a line gets dots, since two points make no curve

  /** The colours of the page as it is now, read from its CSS variables. */
  function readInk() {
    const css = getComputedStyle(document.body);
    const ink = (name) => css.getPropertyValue(`--sb-${name}`).trim();
    const names = ["surface", "line", "text", "help", "run", "warn", "bad", "rest", "series-2", "series-3"];
    return Object.fromEntries(names.map((name) => [name, ink(name)]));
  }

  /** What all charts of a page agree on: the x axis, its zoom, log or not, the colours. */
  class View {
    constructor() {
      this.axis = null; // null: time until the first step is done, then step
      this.log = false;
      this.range = null;
      this.unit = UNITS[0];
      this.charts = [];
      this.ink = readInk();
    }

    isByTime(model) {
      return this.axis === "time" || (this.axis === null && !model.clock.x.length);
    }

    /** x of a step and of a moment, on the axis in use. */
    places(model) {
      const byTime = this.isByTime(model);
      const began = model.worked(this.axis === "time" && model.clock.x.length ? model.began : 0);
      const time = (t) => (model.worked(t) - began) / this.unit[1];
      return byTime
        ? { byTime, ofStep: (step) => time(model.timeOf(step)), ofTime: time }
        : { byTime, ofStep: (step) => step, ofTime: (t) => model.stepAt(t) };
    }

    /** Pick the unit of the time axis; true when it changed and the x values with it. */
    fit(model) {
      const span = model.worked(model.fast.now ?? 0);
      const unit = UNITS.find(([, , limit]) => span < limit);
      const changed = unit !== this.unit;
      if (changed && this.range && this.isByTime(model)) {
        this.range = this.range.map((x) => (x * this.unit[1]) / unit[1]);
      }
      this.unit = unit;
      return changed;
    }

    /** The whole run: what every chart shows while nobody has zoomed, so that their axes agree. */
    full(model) {
      const at = this.places(model), { step = 0, now = 0 } = model.fast;
      if (!at.byTime) return [-0.005 * Math.max(step, 1), 1.005 * Math.max(step, 1)];
      const end = model.isLive ? now : model.lastSignBefore(Infinity);
      return [at.ofTime(0), Math.max(at.ofTime(end), at.ofTime(0) + 1 / this.unit[1])];
    }

    /** Show `range` on every chart; `from` is the one where the person did it. */
    zoom(range, from) {
      this.range = range;
      for (const chart of this.charts) if (chart !== from && chart.isDrawn) chart.quietly({ "xaxis.range": range });
    }
  }

  function line(name, x, y, colour, style = {}) {
    const { width = 2, dash = "solid", yaxis = "y", ...rest } = style;
    const format = style.format ?? ".3f";
    delete rest.format;
    return {
      name, x, y, yaxis, type: "scatter", mode: x.length <= FEW && width > 1 ? "lines+markers" : "lines",
      line: { color: colour, width, dash }, marker: { color: colour, size: 4 }, connectgaps: false,
      hovertemplate: `${name} %{y:${format}}<extra></extra>`, ...rest,
    };
  }

  function marks(name, points, height, symbol, colour, size) {
    return {
      name, yaxis: "y9", type: "scatter", mode: "markers", cliponaxis: false,
      x: points.map((p) => p.x), y: points.map(() => height), text: points.map((p) => p.text),
      marker: { symbol, color: colour, size, line: { color: colour, width: 2 } },
      hovertemplate: "%{text}<extra></extra>",
    };
  }

  /** Loss: every value faint, the smoothed line over it, held-out dots, ticks and signs for what happened. */
  function lossChart(model, view) {
    const at = view.places(model), ink = view.ink;
    const { x = [], y = [] } = model.series.loss ?? {};
    const evals = model.of("eval").filter((e) => Number.isFinite(signalbox.number(e.loss)));
    const bad = x.map((step, i) => ({ step, value: y[i] })).filter((p) => !Number.isFinite(p.value));
    const point = (text) => (e) => ({ x: at.ofStep(e.step), text: text(e) });
    const alerts = model.of("alert").filter((e) => e.step != null);
    const breaks = model.of(...Object.keys(BREAKS)).filter((e) => e.step > 0);
    const finite = (value) => (Number.isFinite(value) ? value : null);
    const places = x.map(at.ofStep);
    return {
      steps: x,
      traces: [
        line("loss", places, y.map(finite), ink.run, { width: 1, opacity: 0.3 }),
        line(`mean of ${model.span} steps`, model.smoothed.x.map(at.ofStep), model.smoothed.y.map(finite), ink.run),
        line("held-out", evals.map((e) => at.ofStep(e.step)), evals.map((e) => e.loss), ink["series-2"], {
          width: 1, mode: "lines+markers", marker: { color: ink["series-2"], size: 6 },
        }),
        marks("saved", model.of("checkpoint").map(point((e) => `saved, step ${e.step}`)), 0, "line-ns-open", ink.help, 9),
        marks("alert", alerts.map(point((e) => `${e.text ?? e.code}`)), 0.95, "triangle-up", ink.warn, 10),
        marks(wordsOf(breaks), breaks.map(point((e) => `${BREAKS[e.kind]}, step ${e.step}`)), 0.95, "x-thin-open", ink.bad, 9),
        marks("NaN", bad.map(({ step, value }) => ({
          x: at.ofStep(step), text: `step ${step}: loss is ${Number.isNaN(value) ? "NaN" : "infinite"}`,
        })), 0.88, "x-thin-open", ink.bad, 9),
      ],
      shapes: [...breaks.map((e) => wall(at.ofStep(e.step), ink.bad)), ...seams(model, at, ink)],
      rows: [{ type: view.log ? "log" : "linear" }],
    };
  }

  /** The legend of the breaks: their word when they are of one kind. */
  function wordsOf(events) {
    const words = new Set(events.map((e) => BREAKS[e.kind]));
    return words.size === 1 ? [...words][0] : "breaks";
  }

  function wall(x, colour) {
    return { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: colour, width: 1 } };
  }

  /** A dashed line where a pause was cut out of the time axis. */
  function seams(model, at, ink) {
    if (!at.byTime) return [];
    return model.pauses.map(([from]) => ({ ...wall(at.ofTime(from), ink.help), line: { color: ink.help, width: 1, dash: "dot" } }));
  }

  /** Memory: on a GPU what the allocator holds and the device's limit; on a CPU the memory of the process alone. */
  function memoryChart(model, view) {
    const at = view.places(model), ink = view.ink, heat = model.heat;
    const on = (name, label, colour, style) => {
      const series = heat[name];
      if (!series) return null;
      const kept = series.x.map((t, i) => [at.ofTime(t), series.y[i]]).filter(([x]) => Number.isFinite(x));
      const y = kept.map((p) => (Number.isFinite(p[1]) ? p[1] : null));
      return line(label, kept.map((p) => p[0]), y, colour, { format: ".1f", ...style });
    };
    const fill = { mode: "lines", fill: "tozeroy", fillcolor: `${ink.run}2E` };
    const gpu = Boolean(heat.allocated_gib);
    const traces = gpu
      ? [
          on("allocated_gib", "allocated", ink.run, fill),
          on("reserved_gib", "reserved", ink.run, { width: 1, dash: "dash", mode: "lines" }),
          on("process_gib", "process, main memory", ink["series-2"], { width: 1, mode: "lines" }),
          on("device_gib", "whole device", ink.help, { width: 1, dash: "dot", mode: "lines" }),
          on("limit_gib", "limit", ink.bad, { width: 1, dash: "dash", mode: "lines" }),
        ]
      : [on("process_gib", "process", ink["series-2"], { ...fill, fillcolor: `${ink["series-2"]}2E` })];
    const limit = gpu ? model.last(heat.limit_gib) : NaN;
    return {
      traces: traces.filter(Boolean),
      shapes: [...phases(model, view, at, ink), ...seams(model, at, ink)],
      notes: Number.isFinite(limit)
        ? [{ text: `limit ${limit.toFixed(1)} GiB`, x: 1, xref: "paper", xanchor: "right", y: limit, yanchor: "bottom" }]
        : [],
      rows: [{ rangemode: "tozero", nticks: 4 }],
    };
  }

  /** Shaded spans of the phases that are not training. */
  function phases(model, view, at, ink) {
    const shapes = [], [low, high] = view.range ?? view.full(model);
    let open = null;
    const close = (until) => {
      const x0 = open && at.ofTime(open.at), x1 = open && at.ofTime(until);
      if (open && Number.isFinite(x0) && x1 > x0) {
        shapes.push({
          type: "rect", xref: "x", yref: "paper", x0, x1, y0: 0, y1: 1, layer: "below", line: { width: 0 },
          fillcolor: `${ink.help}1F`, label: (x1 - x0) / (high - low) > 0.06
            ? { text: open.name, textposition: "top left", font: { size: 12, color: ink.help } } : undefined,
        });
      }
      open = null;
    };
    for (const event of model.of("phase", "running", "paused", "stopped", "finished", "failed", "diverged")) {
      if (open && event.kind === "phase" && event.name === open.name) continue;
      close(event.at);
      if (event.kind === "phase" && event.name !== "train") open = event;
    }
    if (open) close(model.fast.now ?? open.at);
    return shapes.slice(-200);
  }

  /** Several small rows over one x axis; a row without a measurement is left out. */
  function stacked(list) {
    return (model, view) => {
      const at = view.places(model), ink = view.ink;
      const rows = list.map((row) => row(model, at, ink)).filter((row) => row.traces.some((t) => t.x.length));
      rows.forEach((row, i) => row.traces.forEach((trace) => (trace.yaxis = i ? `y${i + 1}` : "y")));
      return { traces: rows.flatMap((row) => row.traces), rows: rows.map(({ title, rangemode, tickformat }) => ({ title, rangemode, tickformat })) };
    };
  }

  const byStep = (title, name, format, tickformat, rangemode) => (model, at, ink) => {
    const { x = [], y = [] } = model.series[name] ?? {};
    return { title, tickformat, rangemode, traces: [line(title, x.map(at.ofStep), y.map((v) => (Number.isFinite(v) ? v : null)), ink.run, { format, width: 1.5 })] };
  };

  const byTime = (title, parts) => (model, at, ink) => ({
    title, rangemode: "tozero",
    traces: parts.filter(([name]) => model.heat[name]).map(([name, label, colour, dash]) => {
      const { x, y } = model.heat[name];
      const kept = x.map((t, i) => [at.ofTime(t), y[i]]).filter(([place]) => Number.isFinite(place));
      return line(label, kept.map((p) => p[0]), kept.map((p) => p[1]), ink[colour], { format: ".0f", width: 1.5, dash, mode: "lines" });
    }),
  });

  const rateChart = stacked([byStep("Learning rate", "learning_rate", ".2~e", ".1~e"), byStep("Gradient norm", "grad_norm", ".2f", "", "tozero")]);
  const speedChart = stacked([
    byStep("Tokens a second", "speed", ",.0f", ",.0f", "tozero"),
    byTime("Utilisation %, temperature °C", [["utilisation", "utilisation %", "run"], ["temperature_c", "temperature °C", "series-2", "dash"]]),
    byTime("Power W", [["power_w", "power W", "run"]]),
  ]);

  /** One drawing: full once and after a change of axis, theme or history; otherwise only what is new. */
  class Chart {
    constructor(box, define, view, onStep) {
      Object.assign(this, { box, define, view, onStep, isDrawn: false, isQuiet: false, yRange: null });
      view.charts.push(this);
    }

    layout(drawing) {
      const { ink } = this.view, font = { color: ink.help, size: 12 };
      const axis = { gridcolor: ink.line, zeroline: false, tickfont: font, automargin: false };
      const byTime = this.view.isByTime(this.model);
      const layout = {
        margin: MARGIN, paper_bgcolor: ink.surface, plot_bgcolor: ink.surface, showlegend: false,
        font: { ...font, family: getComputedStyle(document.body).fontFamily }, hovermode: "x unified",
        hoverlabel: { bgcolor: ink.surface, bordercolor: ink.line, font: { color: ink.text, size: 12 } },
        dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", uirevision: "kept",
        xaxis: {
          ...axis, showgrid: false, linecolor: ink.line, showline: true, nticks: 10, autorange: false, range: this.xRange(),
          tickformat: byTime ? "~g" : ",d", ticksuffix: byTime ? ` ${this.view.unit[0]}` : "",
          tickprefix: byTime ? "" : "step ", showtickprefix: "first",
          unifiedhovertitle: { text: byTime ? `%{x:.3~g} ${this.view.unit[0]}` : "step %{x:,.0f}" },
        },
        yaxis9: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
        shapes: drawing.shapes ?? [],
        annotations: (drawing.notes ?? []).map((note) => ({ showarrow: false, font, ...note })),
      };
      this.addRows(layout, drawing, axis, font);
      return layout;
    }

    addRows(layout, drawing, axis, font) {
      const count = drawing.rows.length, gap = 0.16 / Math.max(count, 1);
      drawing.rows.forEach(({ title, type = "linear", rangemode = "normal", tickformat = "", nticks = count > 1 ? 4 : 6 }, i) => {
        const low = (count - 1 - i) / count, high = (count - i) / count - (count > 1 ? gap : 0);
        layout[i ? `yaxis${i + 1}` : "yaxis"] = {
          ...axis, type, rangemode, domain: [low, high], nticks, tickformat,
          ...(this.yRange && !i ? { range: this.yRange, autorange: false } : { autorange: true }),
        };
        if (title) layout.annotations.push({ text: title, x: 0, y: high, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, font });
      });
      if (count > 1) layout.xaxis.anchor = `y${count}`;
    }

    xRange() {
      return this.view.range ?? this.view.full(this.model);
    }

    /** Bring the drawing up to date with `model`. `anew` redraws all of it. */
    async update(model, anew) {
      this.model = model;
      const drawing = this.define(model, this.view);
      const shape = JSON.stringify(drawing.traces.map((t) => [t.name, t.mode]));
      const grew = drawing.traces.every((t, i) => t.x.length >= (this.counts?.[i] ?? 0));
      if (anew || !this.isDrawn || shape !== this.shape || !grew) await this.drawAll(drawing);
      else await this.drawNew(drawing);
      Object.assign(this, { shape, drawing, counts: drawing.traces.map((t) => t.x.length) });
    }

    async drawAll(drawing) {
      const config = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false };
      this.isQuiet = true;
      await Plotly.react(this.box, drawing.traces, this.layout(drawing), config);
      this.isQuiet = false;
      this.around = JSON.stringify([drawing.shapes, drawing.notes]);
      if (!this.isDrawn) this.listen();
      this.isDrawn = true;
    }

    async drawNew(drawing) {
      this.box.layout.xaxis.range = this.xRange(); // taken up by the extension below, without a drawing of its own
      for (const isMark of [false, true]) {
        const fresh = drawing.traces.map((t, i) => i)
          .filter((i) => Boolean(drawing.traces[i].text) === isMark && drawing.traces[i].x.length > this.counts[i]);
        if (!fresh.length) continue;
        const tail = (key) => fresh.map((i) => drawing.traces[i][key].slice(this.counts[i]));
        const update = { x: tail("x"), y: tail("y"), ...(isMark ? { text: tail("text") } : {}) };
        await Plotly.extendTraces(this.box, update, fresh);
      }
      const around = JSON.stringify([drawing.shapes, drawing.notes]);
      if (around !== this.around) {
        this.around = around;
        const { shapes, annotations } = this.layout(drawing);
        await this.quietly({ shapes, annotations });
      }
    }

    /** A relayout that is not the person's zoom. */
    async quietly(update) {
      this.isQuiet = true;
      await Plotly.relayout(this.box, update);
      this.isQuiet = false;
    }

    listen() {
      this.box.on("plotly_relayout", (change) => this.onRelayout(change));
      this.box.on("plotly_doubleclick", () => this.resetZoom());
      this.box.on("plotly_click", ({ points }) => {
        const trace = this.drawing.traces[0], steps = this.drawing.steps;
        if (!this.onStep || !steps?.length || !points.length) return;
        const at = Math.max(signalbox.lastAtOrBefore(trace.x, points[0].x + 1e-9), 0);
        this.onStep(steps[at]);
      });
    }

    onRelayout(change) {
      if (this.isQuiet) return;
      if ("yaxis.range[0]" in change) this.yRange = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
      if (change["yaxis.autorange"]) this.yRange = null;
      if ("xaxis.range[0]" in change) this.view.zoom([change["xaxis.range[0]"], change["xaxis.range[1]"]], this);
    }

    /** Back to the whole run, on every chart. */
    resetZoom() {
      this.view.range = null;
      for (const chart of this.view.charts) {
        chart.yRange = null;
        if (chart.isDrawn) chart.quietly({ "xaxis.range": chart.xRange(), "yaxis.autorange": true });
      }
    }

    /** Save what is drawn as a PNG. */
    savePng(name) {
      const { width, height } = this.box.getBoundingClientRect();
      Plotly.downloadImage(this.box, { format: "png", filename: name, width, height, scale: 2 });
    }
  }

  /** The legend of what is drawn: a sample of the line or sign, and its name. */
  function keys({ drawing }) {
    const { svg, el } = signalbox;
    const signs = { "line-ns-open": "M8 1v8", "triangle-up": "M8 1l4 8H4z", "x-thin-open": "M4 1l8 8m0-8l-8 8" };
    return drawing.traces.filter((trace) => trace.x.length).map((trace) => {
      const { symbol } = trace.marker, dash = { dash: "4 3", dot: "1 3" }[trace.line?.dash] ?? "none";
      const mark = trace.text
        ? { d: signs[symbol], stroke: trace.marker.color, fill: symbol === "triangle-up" ? trace.marker.color : "none", "stroke-width": 1.5 }
        : { d: "M0 5h16", stroke: trace.line.color, fill: "none", "stroke-width": Math.max(trace.line.width, 1.5), "stroke-dasharray": dash, opacity: trace.opacity ? 0.5 : 1 };
      return el("span.sb-live-key", svg("svg", { width: 16, height: 10, "aria-hidden": "true" }, svg("path", mark)), trace.name);
    });
  }

  signalbox.charts = { keys, View, Chart, readInk, lossChart, memoryChart, rateChart, speedChart };
})();
