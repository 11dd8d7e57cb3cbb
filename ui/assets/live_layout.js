// The parts of the live board, made once: title, progress, key figures, chart panels with their tools. live_head.js and
// charts.js fill them.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button, say } = signalbox;
  const SPANS = [1, 3, 5, 10, 20, 50, 100, 200, 500, 1000];
  const FIGURES = ["Loss", "Held-out", "Memory", "Speed"];

  /** Put the whole board into `board.root`; what changes later is in `board.parts`. */
  function buildBoard(board) {
    const p = (board.parts = notices());
    Object.assign(p, title(), progress());
    p.figures = el("section.sb-panel.sb-live-figures", { "aria-label": "Key figures" });
    p.figure = Object.fromEntries(FIGURES.map((name) => [name, figure(name, p.figures)]));
    board.actions = new signalbox.RunActions(board);
    board.panels = new signalbox.LivePanels(board);
    const head = el("div.sb-live-head", p.details, p.model, p.state, board.actions.row);
    const charts = el("div.sb-live-charts", lossPanel(board), memoryPanel(board), closedPanels(board));
    const grid = el("div.sb-live-grid", charts, board.panels.side());
    const above = [p.elsewhere, p.silence, head, p.progress, p.preparing, p.back, p.notice, p.figures];
    board.root.replaceChildren(el("div.sb-live", above, grid, board.panels.tabs(), p.spoken));
  }

  function notices() {
    const elsewhereText = el("span"), elsewhereLink = el("a", { href: "live" });
    return {
      elsewhereText,
      elsewhereLink,
      elsewhere: el("div.sb-live-bar", { hidden: true }, elsewhereText, elsewhereLink),
      silence: el("div.sb-live-bar.sb-tone-warn", { hidden: true, role: "status" }),
      back: el("p.sb-live-back.sb-help", { hidden: true }),
      notice: el("section.sb-live-notice", { hidden: true, "aria-label": "How the run ended" }),
      spoken: el("p.sb-hidden", { "aria-live": "polite" }),
    };
  }

  function title() {
    const name = el("h1"), facts = el("dl.sb-live-facts");
    return {
      title: name,
      facts,
      details: el("details.sb-live-title", el("summary", name), facts),
      model: el("span.sb-live-model.sb-help"),
      state: el("span.sb-live-state"),
    };
  }

  function progress() {
    const bar = el("span.sb-live-fill"), steps = el("span.sb-live-steps"), left = el("span.sb-live-left");
    const track = el("div.sb-live-track", { role: "progressbar", "aria-label": "Steps done", "aria-valuemin": 0 }, bar);
    const safe = el("span.sb-help");
    return {
      bar,
      track,
      steps,
      left,
      safe,
      progress: el("div.sb-live-progress", track, steps, left, safe),
      preparing: el("ol.sb-live-preparing", { hidden: true, "aria-label": "Preparing" }),
    };
  }

  /** One key figure: name, value, what it means. Returns the function that fills it. */
  function figure(name, parent) {
    const value = el("strong.sb-live-value"), note = el("span.sb-live-note");
    parent.append(el("div.sb-live-figure", el("span.sb-live-name", name), value, note));
    return (text, meaning, tone = "") => {
      say(value, text);
      say(note, meaning);
      note.className = `sb-live-note${tone ? ` sb-tone-${tone}` : ""}`;
    };
  }

  // ---- charts --------------------------------------------------------------------------------------------------

  /** A chart with the place of its legend; `panel` is the details element that it is drawn in only when open. */
  function chart(board, define, size, label) {
    const box = el(`div.sb-chart.sb-chart-${size}`, { role: "region", "aria-label": label });
    const made = new signalbox.charts.Chart(box, define, board.view, (step) => board.panels.showRows(step));
    made.legend = el("span.sb-live-keys", { "aria-hidden": "true" });
    return made;
  }

  function lossPanel(board) {
    const made = chart(board, signalbox.charts.lossChart, "loss", "Loss by step; a table of the last values follows");
    const log = toggle("log", () => board.view.log, () => {
      board.view.log = !board.view.log;
      made.yRange = null;
      board.draw(true);
    });
    board.axisSwitch = axisSwitch(board);
    board.lastValues = el("table.sb-hidden");
    const tools = el("div.sb-live-tools", smoothing(board), log, board.axisSwitch, menu(board, made));
    const head = el("div.sb-live-panelhead", el("h2", "Loss"), made.legend, tools);
    return el("section.sb-panel", head, made.box, board.lastValues);
  }

  function smoothing(board) {
    const text = el("output", `${board.model.span} steps`);
    const words = "Smooth over how many steps";
    const range = el("input", { type: "range", min: 0, max: SPANS.length - 1, "aria-label": words });
    range.value = SPANS.indexOf(board.model.span);
    range.addEventListener("input", () => {
      const span = SPANS[range.value];
      say(text, span === 1 ? "off" : `${span} steps`);
      board.model.smooth(span);
      board.draw(true);
    });
    return el("label.sb-live-smooth", "smooth ", range, text);
  }

  function axisSwitch(board) {
    const isTime = () => board.view.isByTime(board.model);
    const choose = (axis) => () => {
      board.view.axis = axis;
      board.view.range = null;
      board.draw(true);
    };
    const both = [toggle("step", () => !isTime(), choose("step")), toggle("time", isTime, choose("time"))];
    return el("span.sb-live-switch", { role: "group", "aria-label": "Horizontal axis" }, both);
  }

  /** A small switch that shows whether it is on; `node.update()` reads it again. */
  function toggle(word, isOn, change) {
    const node = button(word, () => (change(), node.update()), "", { class: "sb-button sb-live-toggle" });
    node.update = () => node.setAttribute("aria-pressed", String(isOn()));
    node.update();
    return node;
  }

  /** The ⋮ of the loss chart. */
  function menu(board, made) {
    const item = (word, act) => el("button", { type: "button", role: "menuitem", onclick: act }, word);
    const address = `${board.base}/metrics.csv`;
    const csv = el("a", { role: "menuitem", href: address, download: `${board.runId}.csv` }, "Every step as CSV");
    const png = item("Picture (PNG)", () => made.savePng(`${board.runId}-loss`));
    const reset = item("Reset zoom", () => made.resetZoom());
    const list = el("div.sb-live-menu", { popover: true, role: "menu" }, csv, png, reset);
    list.addEventListener("click", () => list.hidePopover());
    const words = { type: "button", "aria-label": "More for this chart", "aria-haspopup": "menu" };
    const opener = el("button.sb-button.sb-live-more", words, "⋮");
    opener.popoverTargetElement = list;
    list.addEventListener("toggle", (event) => {
      if (event.newState !== "open") return;
      const place = opener.getBoundingClientRect();
      list.style.top = `${place.bottom + 4}px`;
      list.style.left = `${place.right - list.offsetWidth}px`;
      csv.focus();
    });
    return el("span", opener, list);
  }

  function memoryPanel(board) {
    const made = chart(board, signalbox.charts.memoryChart, "memory", "Memory over the run");
    board.parts.memoryTitle = el("h2", "Memory, GiB");
    return el("section.sb-panel", el("div.sb-live-panelhead", board.parts.memoryTitle, made.legend), made.box);
  }

  function closedPanels(board) {
    const { rateChart, speedChart } = signalbox.charts;
    const panels = [["Rate, gradient", rateChart], ["Speed, heat, power", speedChart]].map(([name, define]) => {
      const made = chart(board, define, "side", name);
      made.panel = el("details.sb-panel.sb-live-closed", el("summary", name), made.box);
      made.panel.addEventListener("toggle", () => made.panel.open && board.draw(true));
      return made.panel;
    });
    return el("div.sb-live-pairclosed", panels);
  }

  signalbox.buildBoard = buildBoard;
})();
