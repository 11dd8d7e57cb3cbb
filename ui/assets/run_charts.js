// What the charts of a run show: each definition takes the model and the view and gives traces, shapes and rows.
// A trace only ever grows between two resets, so that charts.js can draw just its new end.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, svg } = signalbox;
  const BREAKS = { oom_rung: "out of memory", rewind: "went back", diverged: "diverged", failed: "failed" };
  const ENDS = ["running", "paused", "stopped", "finished", "failed", "diverged"];
  const FEW = 40; // up to here a line gets dots, since two points make no curve
  const SHADES = 200;
  const ROOM = 0.06; // share of the axis from which on a phase has room for its name
  const SIGNS = { "line-ns-open": "M8 1v8", "triangle-up": "M8 1l4 8H4z", "x-thin-open": "M4 1l8 8m0-8l-8 8" };
  const WAITING = { text: "The curve begins with the first step.", x: 0.5, y: 0.5, xref: "paper", yref: "paper" };
  const DASHES = { dash: "4 3", dot: "1 3" };

  const finite = (value) => (Number.isFinite(value) ? value : null);
  /** Plotly reads a little markup in its texts; ours has none. */
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

  function line(name, x, y, colour, { width = 2, dash = "solid", format = ".3f", ...rest } = {}) {
    const mode = x.length <= FEW && width > 1 ? "lines+markers" : "lines";
    return {
      name, x, y, mode, type: "scatter", yaxis: "y", connectgaps: false, line: { color: colour, width, dash },
      marker: { color: colour, size: 4 }, hovertemplate: `${name} %{y:${format}}<extra></extra>`, ...rest,
    };
  }

  /** Signs at a fixed height of the plot; `points` are {x, text}. */
  function marks(name, points, height, symbol, colour, size) {
    return {
      name, type: "scatter", mode: "markers", yaxis: "y9", cliponaxis: false,
      x: points.map((p) => p.x), y: points.map(() => height), text: points.map((p) => plain(p.text)),
      marker: { symbol, color: colour, size, line: { color: colour, width: 2 } },
      hovertemplate: "%{text}<extra></extra>",
    };
  }

  // ---- loss ----------------------------------------------------------------------------------------------------

  /** Loss: every value faint, the smoothed line over it, held-out dots, ticks and signs for what happened. */
  function lossChart(model, view) {
    const at = view.places(model), { ink } = view;
    const { x = [], y = [] } = model.series.loss ?? {};
    const evals = model.of("eval").map((event) => ({ step: event.step, value: signalbox.number(event.loss) }));
    const losses = x.map((step, i) => ({ step, value: y[i] }));
    const sound = evals.filter(({ value }) => Number.isFinite(value));
    const dots = { width: 1, mode: "lines+markers", marker: { color: ink["series-2"], size: 6 } };
    const breaks = model.of(...Object.keys(BREAKS)).filter((event) => event.step > 0);
    return {
      steps: x,
      traces: [
        line("loss", x.map(at.ofStep), y.map(finite), ink.run, { width: 1, opacity: 0.3 }),
        line(`mean of ${model.span} steps`, model.smoothed.x.map(at.ofStep), model.smoothed.y.map(finite), ink.run),
        line("held-out", sound.map((e) => at.ofStep(e.step)), sound.map((e) => e.value), ink["series-2"], dots),
        ...signs(model, at, ink, breaks, [...unsound("loss", losses), ...unsound("held-out loss", evals)]),
      ],
      shapes: [...breaks.map((event) => wall(at.ofStep(event.step), ink.bad)), ...seams(model, at, ink)],
      notes: x.length ? [] : [WAITING],
      rows: [{ type: view.log ? "log" : "linear", isEmpty: !x.length }],
    };
  }

  function signs(model, at, ink, breaks, unsoundPoints) {
    const place = (events, text) => events.map((event) => ({ x: at.ofStep(event.step), text: text(event) }));
    const saved = place(model.of("checkpoint"), ({ step }) => `saved, step ${step}`);
    const alerts = place(model.of("alert", "bad_row").filter(({ step }) => step > 0), ({ text, code }) => text ?? code);
    const broken = place(breaks, ({ kind, step }) => `${BREAKS[kind]}, step ${step}`);
    return [
      marks("saved", saved, 0, "line-ns-open", ink.help, 9),
      marks("alert", alerts, 0.95, "triangle-up", ink.warn, 10),
      marks(wordsOf(breaks), broken, 0.95, "x-thin-open", ink.bad, 9),
      marks("NaN", place(unsoundPoints, ({ text }) => text), 0.88, "x-thin-open", ink.bad, 9),
    ];
  }

  /** Values that have no height: marked at the top of the plot, never drawn as 0. */
  function unsound(name, points) {
    const word = (value) => (Number.isNaN(value) ? "NaN" : "infinite");
    return points.filter(({ value }) => !Number.isFinite(value))
      .map(({ step, value }) => ({ step, text: `step ${step}: ${name} is ${word(value)}` }));
  }

  /** The legend of the breaks: their word when they are of one kind. */
  function wordsOf(events) {
    const words = new Set(events.map((event) => BREAKS[event.kind]));
    return words.size === 1 ? [...words][0] : "breaks";
  }

  function wall(x, colour, dash = "solid") {
    return { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: colour, width: 1, dash } };
  }

  /** A dotted line where a pause was cut out of the time axis. */
  function seams(model, at, ink) {
    return at.byTime ? model.pauses.map(([from]) => wall(at.ofTime(from), ink.help, "dot")) : [];
  }

  // ---- memory --------------------------------------------------------------------------------------------------

  /** A telemetry column as a line, or null where nobody could measure it. */
  function measured(model, at, name, label, colour, style) {
    const series = model.heat[name];
    if (!series) return null;
    const kept = series.x.map((t, i) => [at.ofTime(t), finite(series.y[i])]).filter(([x]) => Number.isFinite(x));
    return line(label, kept.map(([x]) => x), kept.map(([, y]) => y), colour, { mode: "lines", ...style });
  }

  /** Memory: on a GPU what the allocator holds and the device's limit; on a CPU the memory of the process alone. */
  function memoryChart(model, view) {
    const at = view.places(model), { ink } = view, gpu = Boolean(model.heat.allocated_gib);
    const filled = (colour) => ({ format: ".1f", fill: "tozeroy", fillcolor: `${colour}2E` });
    const thin = (dash) => ({ format: ".1f", width: 1, dash });
    const traces = gpu
      ? [
          measured(model, at, "allocated_gib", "allocated", ink.run, filled(ink.run)),
          measured(model, at, "reserved_gib", "reserved", ink.run, thin("dash")),
          measured(model, at, "process_gib", "process, main memory", ink["series-2"], thin("solid")),
          measured(model, at, "device_gib", "whole device", ink.help, thin("dot")),
          measured(model, at, "limit_gib", "limit", ink.bad, thin("dash")),
        ]
      : [measured(model, at, "process_gib", "process", ink["series-2"], filled(ink["series-2"]))];
    const limit = gpu ? model.last(model.heat.limit_gib) : NaN;
    const note = { x: 1, xref: "paper", xanchor: "right", y: limit, yanchor: "bottom" };
    return {
      traces: traces.filter(Boolean),
      shapes: [...shades(model, view, at), ...seams(model, at, ink)],
      notes: Number.isFinite(limit) ? [{ ...note, text: `limit ${limit.toFixed(1)} GiB` }] : [],
      rows: [{ rangemode: "tozero", nticks: 4 }],
    };
  }

  /** Shaded spans of the phases that are not training. */
  function shades(model, view, at) {
    const [low, high] = view.range ?? view.full(model), found = [];
    let open = null;
    const close = (until) => {
      const x0 = open && at.ofTime(open.at), x1 = open && at.ofTime(until);
      if (open && Number.isFinite(x0) && x1 > x0) found.push(shade(open.name, x0, x1, (x1 - x0) / (high - low), view.ink));
      open = null;
    };
    for (const event of model.of("phase", ...ENDS)) {
      if (open && event.kind === "phase" && event.name === open.name) continue;
      close(event.at);
      if (event.kind === "phase" && event.name !== "train") open = event;
    }
    if (open) close(model.fast.now ?? open.at);
    return found.slice(-SHADES);
  }

  function shade(name, x0, x1, share, ink) {
    const label = { text: plain(name), textposition: "top left", font: { size: 12, color: ink.help } };
    return {
      type: "rect", xref: "x", yref: "paper", x0, x1, y0: 0, y1: 1, layer: "below", line: { width: 0 },
      fillcolor: `${ink.help}1F`, ...(share > ROOM ? { label } : {}),
    };
  }

  // ---- small rows over one x axis --------------------------------------------------------------------------------

  /** Several rows over each other; a row without a measurement is left out. */
  function stacked(...list) {
    return (model, view) => {
      const at = view.places(model);
      const rows = list.map((row) => row(model, at, view.ink)).filter((row) => row.traces.some((t) => t.x.length));
      rows.forEach((row, i) => row.traces.forEach((trace) => (trace.yaxis = i ? `y${i + 1}` : "y")));
      return { traces: rows.flatMap((row) => row.traces), rows };
    };
  }

  const byStep = (title, name, settings) => (model, at, ink) => {
    const { x = [], y = [] } = model.series[name] ?? {}, { format, ...row } = settings;
    return { title, ...row, traces: [line(title, x.map(at.ofStep), y.map(finite), ink.run, { format, width: 1.5 })] };
  };

  const byTime = (title, ...parts) => (model, at, ink) => {
    const traces = parts.map(([name, label, colour, dash]) =>
      measured(model, at, name, label, ink[colour], { format: ".0f", width: 1.5, dash }));
    return { title, rangemode: "tozero", traces: traces.filter(Boolean) };
  };

  const rateChart = stacked(
    byStep("Learning rate", "learning_rate", { format: ".2~e", tickformat: ".1~e" }),
    byStep("Gradient norm", "grad_norm", { format: ".2f", rangemode: "tozero" }),
  );
  const speedChart = stacked(
    byStep("Tokens a second", "speed", { format: ",.0f", tickformat: ",.0f", rangemode: "tozero" }),
    byTime(
      "Utilisation %, temperature °C",
      ["utilisation", "utilisation %", "run"],
      ["temperature_c", "temperature °C", "series-2", "dash"],
    ),
    byTime("Power W", ["power_w", "power W", "run"]),
  );

  // ---- legend --------------------------------------------------------------------------------------------------

  /** The legend of what is drawn: a sample of the line or sign, and its name. */
  function legend(traces) {
    return traces.filter((trace) => trace.x.length).map((trace) => {
      const path = svg("path", trace.text ? signSample(trace.marker) : lineSample(trace));
      return el("span.sb-live-key", svg("svg", { width: 16, height: 10, "aria-hidden": "true" }, path), trace.name);
    });
  }

  function signSample({ symbol, color }) {
    const fill = symbol === "triangle-up" ? color : "none";
    return { d: SIGNS[symbol], stroke: color, fill, "stroke-width": 1.5 };
  }

  function lineSample({ line: { color, width, dash }, opacity }) {
    const style = { "stroke-dasharray": DASHES[dash] ?? "none", opacity: opacity ? 0.5 : 1 };
    return { d: "M0 5h16", stroke: color, fill: "none", "stroke-width": Math.max(width, 1.5), ...style };
  }

  Object.assign(signalbox.charts, { lossChart, memoryChart, rateChart, speedChart, legend });
})();
