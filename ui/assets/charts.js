// Charts that are drawn once and then only extended; zoom, theme and axis are kept by the View that all of them share.
// What a chart shows is defined in run_charts.js. Needs window.Plotly, the file of the plotly wheel.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});

  const ROW_GAP = 0.22; // share of a row's height that its title takes
  const NARROW_PX = 500;
  const MARGIN = { l: 44, r: 12, t: 10, b: 24 };
  const UNITS = [["s", 1, 180], ["min", 60, 10_800], ["h", 3600, Infinity]];

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
      for (const { box, isDrawn } of this.charts) {
        if (isDrawn && box !== from) Plotly.relayout(box, { "xaxis.range": range });
      }
    }
  }

  /** One drawing: full once and after a change of axis, theme or history; otherwise only what is new. */
  class Chart {
    constructor(box, define, view, onStep) {
      Object.assign(this, { box, define, view, onStep, isDrawn: false, yRange: null });
      view.charts.push(this);
    }

    layout(drawing) {
      const { ink } = this.view, font = { color: ink.help, size: 12 };
      const axis = { gridcolor: ink.line, zeroline: false, tickfont: font, automargin: false };
      const layout = {
        margin: MARGIN, paper_bgcolor: ink.surface, plot_bgcolor: ink.surface, showlegend: false,
        font: { ...font, family: getComputedStyle(document.body).fontFamily }, hovermode: "x unified",
        hoverlabel: { bgcolor: ink.surface, bordercolor: ink.line, font: { color: ink.text, size: 12 } },
        dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
        xaxis: { ...axis, ...this.xAxis(ink) },
        yaxis9: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
        shapes: drawing.shapes ?? [],
        annotations: (drawing.notes ?? []).map((note) => ({ showarrow: false, font, ...note })),
      };
      const count = drawing.rows.length;
      drawing.rows.forEach((row, i) => this.addRow(layout, row, i, count, axis));
      if (count > 1) layout.xaxis.anchor = `y${count}`;
      return layout;
    }

    xAxis(ink) {
      const isTime = this.view.isByTime(this.model), unit = this.view.unit[0];
      const words = isTime
        ? { tickformat: "~g", ticksuffix: ` ${unit}`, tickprefix: "", unifiedhovertitle: { text: `%{x:.3~g} ${unit}` } }
        : { tickformat: ",d", ticksuffix: "", tickprefix: "step ", unifiedhovertitle: { text: "step %{x:,.0f}" } };
      const nticks = this.box.clientWidth < NARROW_PX ? 5 : 10;
      const line = { showgrid: false, linecolor: ink.line, showline: true, nticks, tickangle: 0, showtickprefix: "first" };
      return { ...line, ...words, autorange: false, range: this.xRange() };
    }

    /** The y axis of row `at` of `count`, the topmost first, with its title above. */
    addRow(layout, row, at, count, axis) {
      const { title, type = "linear", rangemode = "normal", tickformat = "", nticks = count > 1 ? 4 : 6 } = row;
      const grid = { showgrid: !row.isEmpty, showticklabels: !row.isEmpty };
      const gap = count > 1 ? ROW_GAP / count : 0;
      const domain = [(count - 1 - at) / count, (count - at) / count - gap];
      const range = this.yRange && at === 0 ? { range: this.yRange, autorange: false } : { autorange: true };
      layout[at ? `yaxis${at + 1}` : "yaxis"] = { ...axis, type, rangemode, domain, nticks, tickformat, ...grid, ...range };
      if (!title) return;
      const place = { x: 0, y: domain[1], xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom" };
      layout.annotations.push({ text: title, ...place, showarrow: false, font: axis.tickfont });
    }

    xRange() {
      return this.view.range ?? this.view.full(this.model);
    }

    /** Bring the drawing up to date with `model`. `anew` redraws all of it. */
    async update(model, anew) {
      this.model = model;
      const drawing = this.define(model, this.view);
      const rows = drawing.rows.map(({ traces, ...row }) => row);
      const shape = JSON.stringify([rows, drawing.traces.map((t) => [t.name, t.mode])]);
      const grew = drawing.traces.every((t, i) => t.x.length >= (this.counts?.[i] ?? 0));
      if (anew || !this.isDrawn || shape !== this.shape || !grew) await this.drawAll(drawing);
      else await this.drawNew(drawing);
      Object.assign(this, { shape, drawing, counts: drawing.traces.map((t) => t.x.length) });
      this.showLegend();
    }

    showLegend() {
      const key = JSON.stringify(this.drawing.traces.map((t) => [t.name, t.x.length > 0, t.marker.color]));
      if (!this.legend || key === this.legendKey) return;
      this.legendKey = key;
      this.legend.replaceChildren(...signalbox.charts.legend(this.drawing.traces));
    }

    async drawAll(drawing) {
      const config = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false };
      await Plotly.react(this.box, drawing.traces, this.layout(drawing), config);
      this.around = JSON.stringify([drawing.shapes, drawing.notes]);
      if (!this.isDrawn) this.listen();
      this.isDrawn = true;
    }

    async drawNew(drawing) {
      const range = this.xRange(), isMoved = JSON.stringify(range) !== JSON.stringify(this.box.layout.xaxis.range);
      this.box.layout.xaxis.range = range; // taken up by an extension below, without a drawing of its own
      let isExtended = false;
      for (const isMark of [false, true]) {
        const fresh = drawing.traces.map((t, i) => i)
          .filter((i) => Boolean(drawing.traces[i].text) === isMark && drawing.traces[i].x.length > this.counts[i]);
        if (!fresh.length) continue;
        const tail = (key) => fresh.map((i) => drawing.traces[i][key].slice(this.counts[i]));
        const update = { x: tail("x"), y: tail("y"), ...(isMark ? { text: tail("text") } : {}) };
        await Plotly.extendTraces(this.box, update, fresh);
        isExtended = true;
      }
      const around = JSON.stringify([drawing.shapes, drawing.notes]);
      if (around !== this.around) {
        this.around = around;
        const { shapes, annotations } = this.layout(drawing);
        await Plotly.relayout(this.box, { shapes, annotations, "xaxis.range": range });
      } else if (isMoved && !isExtended) await Plotly.relayout(this.box, { "xaxis.range": range });
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

    /** A person's zoom names the ends one by one; our own calls give "xaxis.range" whole and are passed over here. */
    onRelayout(change) {
      if ("yaxis.range[0]" in change) this.yRange = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
      if ("xaxis.range[0]" in change) this.view.zoom([change["xaxis.range[0]"], change["xaxis.range[1]"]], this.box);
    }

    /** Back to the whole run, on every chart. */
    resetZoom() {
      this.view.range = null;
      for (const chart of this.view.charts) {
        chart.yRange = null;
        if (chart.isDrawn) Plotly.relayout(chart.box, { "xaxis.range": chart.xRange(), "yaxis.autorange": true });
      }
    }

    /** Save what is drawn as a PNG. */
    savePng(name) {
      const { width, height } = this.box.getBoundingClientRect();
      Plotly.downloadImage(this.box, { format: "png", filename: name, width, height, scale: 2 });
    }
  }

  signalbox.charts = { View, Chart, readInk };
})();
