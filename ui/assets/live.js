// The live board of one run: title, actions, progress, key figures, charts; the panels around them are in live_panels.js.
// Everything shown comes from the feed; nothing is kept here that a second tab would not see too.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, chip, button, say } = signalbox;
  const ENDED_BADLY = ["failed", "diverged", "interrupted"];
  const SPANS = [1, 3, 5, 10, 20, 50, 100, 200, 500, 1000];

  const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
  const known = (value) => (Number.isFinite(value) ? value : null);

  class LiveBoard {
    constructor(element, { plotly }) {
      this.root = element;
      this.model = new signalbox.RunModel();
      this.view = new signalbox.charts.View();
      this.plotly = loadOnce(plotly);
      this.mark = "";
      this.cursor = "";
      this.runId = new URLSearchParams(location.search).get("run");
      this.state = null;
      this.isRedrawn = true;
      document.addEventListener("signalbox:state", (event) => this.onMachine(event.detail));
      new MutationObserver(() => this.onTheme()).observe(document.body, { attributes: true, attributeFilter: ["class"] });
      if (this.runId) this.follow(this.runId);
      else this.idle();
    }

    // ---- which run ---------------------------------------------------------------------------------------------

    /** Show the run `runId` from its first point on. */
    follow(runId) {
      this.poller?.stop();
      this.runId = runId;
      this.cursor = this.mark = "";
      this.build();
      history.replaceState(null, "", `${location.pathname}?run=${encodeURIComponent(runId)}`); // the page has a <base>
      this.poller = new signalbox.Poller(this.root, {
        address: () => `${this.base}/feed?gen=${this.model.fast.gen ?? ""}&since=${this.cursor}&h=${this.mark}`,
        onAnswer: (answer) => this.onAnswer(answer),
        onSilence: (since) => this.onSilence(since),
        onGone: (sentence) => this.root.replaceChildren(el("section.sb-panel.sb-live-idle", el("p", sentence), el("a", { href: "runs" }, "All runs"))),
      });
    }

    get base() {
      return `api/runs/${encodeURIComponent(this.runId)}`;
    }

    /** No run: say so, and what was last. Filled by the header's news of the machine. */
    idle() {
      this.idleText = el("p", "Looking …");
      this.root.replaceChildren(el("section.sb-panel.sb-live-idle", { role: "status" }, this.idleText));
    }

    onMachine(state) {
      if (!this.runId) {
        if (state.run) return this.follow(state.run.run_id);
        const parts = ["Idle", state.machine];
        const last = state.last && el("a", { href: `live?run=${encodeURIComponent(state.last.run_id)}` },
          `Last: ${state.last.state}${state.last.ended_at ? ` ${clock(state.last.ended_at)}` : ""} ▸`);
        this.idleText.replaceChildren(parts.join(" · "), ...(last ? [" · ", last] : []), " ");
        if (!this.startLink) this.idleText.after((this.startLink = el("a.sb-button.sb-primary", { href: "./" }, "Start a run")));
        if (state.advice) this.idleText.append(el("span.sb-tone-warn", ` ${state.advice}`));
        return;
      }
      const other = state.run && state.run.run_id !== this.runId ? state.run : null;
      this.parts.elsewhere.hidden = !other || this.model.isLive;
      if (!other) return;
      const ended = this.model.status.ended_at;
      say(this.parts.elsewhereText, `You are looking at ${/^i/.test(this.model.fast.state ?? "") ? "an" : "a"} ${this.model.fast.state ?? ""} run${ended ? ` (${signalbox.numbers.when(ended, Date.now() / 1000)})` : ""}. Running now: `);
      this.parts.elsewhereLink.textContent = `${other.name} ▸`;
      this.parts.elsewhereLink.href = `live?run=${encodeURIComponent(other.run_id)}`;
    }

    // ---- the page, once ----------------------------------------------------------------------------------------

    build() {
      const p = (this.parts = {});
      p.elsewhereText = el("span");
      p.elsewhereLink = el("a", { href: "live" });
      p.elsewhere = el("div.sb-live-bar", { hidden: true }, p.elsewhereText, p.elsewhereLink);
      p.silence = el("div.sb-live-bar.sb-tone-warn", { hidden: true, role: "status" });
      p.title = el("summary");
      p.facts = el("dl.sb-live-facts");
      p.model = el("span.sb-live-model.sb-help");
      p.state = el("span.sb-live-state");
      this.actions = new signalbox.RunActions(this);
      p.bar = el("span.sb-live-fill");
      p.track = el("div.sb-live-track", { role: "progressbar", "aria-label": "Steps done", "aria-valuemin": 0 }, p.bar);
      p.steps = el("span.sb-live-steps");
      p.left = el("span.sb-live-left");
      p.safe = el("span.sb-help");
      p.progress = el("div.sb-live-progress", p.track, p.steps, p.left, p.safe);
      p.preparing = el("ol.sb-live-preparing", { hidden: true, "aria-label": "Preparing" });
      p.back = el("p.sb-live-back.sb-help", { hidden: true });
      p.notice = el("section.sb-live-notice", { hidden: true, "aria-label": "How the run ended" });
      p.figures = el("section.sb-panel.sb-live-figures", { "aria-label": "Key figures" });
      p.figure = Object.fromEntries(["Loss", "Held-out", "Memory", "Speed"].map((name) => [name, figure(name, p.figures)]));
      p.spoken = el("p.sb-hidden", { "aria-live": "polite" });
      this.panels = new signalbox.LivePanels(this);
      const head = el("div.sb-live-head", el("details.sb-live-title", p.title, p.facts), p.model, p.state, this.actions.row);
      const charts = el("div.sb-live-charts", this.lossPanel(), this.memoryPanel(), el("div.sb-live-pairclosed", this.closedPanels()));
      const grid = el("div.sb-live-grid", charts, this.panels.side());
      this.root.replaceChildren(el("div.sb-live", p.elsewhere, p.silence, head, p.progress, p.preparing, p.back, p.notice, p.figures, grid, this.panels.tabs(), p.spoken));
    }

    chart(define, height, label) {
      const box = el(`div.sb-chart.sb-chart-${height}`, { role: "region", "aria-label": label });
      const chart = new signalbox.charts.Chart(box, define, this.view, (step) => this.panels.showRows(step));
      return chart;
    }

    lossPanel() {
      this.lossChart = this.chart(signalbox.charts.lossChart, "loss", "Loss by step; the table below holds the last values");
      const spanText = el("output", `${this.model.span} steps`);
      const range = el("input", { type: "range", min: 0, max: SPANS.length - 1, value: SPANS.indexOf(this.model.span), "aria-label": "Smooth over how many steps" });
      range.addEventListener("input", () => {
        const span = SPANS[range.value];
        say(spanText, span === 1 ? "off" : `${span} steps`);
        this.model.smooth(span);
        this.draw(true);
      });
      const log = toggle("log", () => this.view.log, () => {
        this.view.log = !this.view.log;
        this.lossChart.yRange = null;
      }, () => this.draw(true));
      const axis = el("span.sb-live-switch", { role: "group", "aria-label": "Horizontal axis" });
      const isTime = () => this.view.isByTime(this.model);
      const choose = (name) => () => {
        this.view.axis = name;
        this.view.range = null;
        this.draw(true);
        for (const b of axis.children) b.update();
      };
      axis.append(toggle("step", () => !isTime(), choose("step")), toggle("time", isTime, choose("time")));
      this.axisSwitch = axis;
      const tools = el("div.sb-live-tools", el("label.sb-live-smooth", "smooth ", range, spanText), log, axis, this.menu());
      this.lastValues = el("table.sb-hidden");
      return el("section.sb-panel", el("div.sb-live-panelhead", el("h2", "Loss"), this.keys(this.lossChart), tools), this.lossChart.box, this.lastValues);
    }

    menu() {
      const csv = el("a", { role: "menuitem", href: `${this.base}/metrics.csv`, download: `${this.runId}.csv` }, "Every step as CSV");
      const item = (word, act) => el("button", { type: "button", role: "menuitem", onclick: act }, word);
      const png = item("Picture (PNG)", () => this.lossChart.savePng(`${this.runId}-loss`));
      const list = el("div.sb-live-menu", { popover: true, role: "menu", onclick: () => list.hidePopover() }, csv, png, item("Reset zoom", () => this.lossChart.resetZoom()));
      const opener = el("button.sb-button.sb-live-more", { type: "button", "aria-label": "More for this chart", "aria-haspopup": "menu" }, "⋮");
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

    memoryPanel() {
      this.memoryChart = this.chart(signalbox.charts.memoryChart, "memory", "Memory over the run");
      this.memoryTitle = el("h2", "Memory, GiB");
      return el("section.sb-panel", el("div.sb-live-panelhead", this.memoryTitle, this.keys(this.memoryChart)), this.memoryChart.box);
    }

    closedPanels() {
      return [["Rate, gradient", "rateChart"], ["Speed, heat, power", "speedChart"]].map(([title, name]) => {
        const chart = (this[name] = this.chart(signalbox.charts[name], "side", title));
        const panel = el("details.sb-panel.sb-live-closed", el("summary", title), chart.box);
        panel.addEventListener("toggle", () => panel.open && this.drawOne(chart, true));
        chart.panel = panel;
        return panel;
      });
    }

    /** The legend beside a title, filled when the chart is drawn. */
    keys(chart) {
      return (chart.keys = el("span.sb-live-keys", { "aria-hidden": "true" }));
    }

    // ---- an answer ---------------------------------------------------------------------------------------------

    async onAnswer(answer) {
      const gen = this.model.fast.gen;
      const { reset, events } = this.model.apply(answer);
      this.cursor = this.model.isHeavy ? "" : answer.next;
      this.mark = answer.h ?? this.mark;
      this.isRedrawn ||= reset || gen !== answer.gen;
      this.poller.isAtRest = !this.model.isLive;
      this.parts.silence.hidden = true;
      this.root.classList.remove("is-silent");
      this.showHead();
      this.showFigures();
      this.showEnd();
      this.panels.update({ reset, events });
      if (reset) this.sinceLast();
      this.remember();
      await this.draw();
    }

    onSilence(since) {
      const silent = (Date.now() - since) / 1000;
      if (silent < 3) return;
      this.root.classList.add("is-silent");
      this.parts.silence.hidden = false;
      say(this.parts.silence, `No answer since ${clock(since / 1000)} (${signalbox.numbers.duration(silent)}). Trying again.`);
    }

    showHead() {
      const { status: s, fast: f, } = this.model, n = signalbox.numbers, p = this.parts;
      const method = { lora: "LoRA", qlora: "QLoRA", full: "full" }[s.method] ?? s.method;
      say(p.title, s.name || [s.model, s.method === "full" ? method : `${method} r${s.rank ?? "–"}`].join(" · "));
      say(p.model, s.name ? s.model : "");
      const facts = [["Run", s.run_id], ["Model", s.model], ["Data", (s.data ?? []).join(", ")], ["Profile", s.profile ?? "none"], ["Device", s.device],
        ["Started", s.started_at && n.when(s.started_at, Date.now() / 1000)], ["By", s.owner], ["Why", s.why]].filter(([, value]) => value);
      const text = JSON.stringify(facts);
      if (this.factsText !== text) {
        this.factsText = text;
        p.facts.replaceChildren(...facts.flatMap(([name, value]) => [el("dt", name), el("dd", value)]));
      }
      if (this.state !== f.state) {
        p.state.replaceChildren(chip(f.state));
        say(p.spoken, `The run is ${f.state}.`);
      }
      const { isLive } = this.model, share = f.total ? Math.min(f.step / f.total, 1) : 0;
      p.bar.style.width = `${share * 100}%`;
      p.track.setAttribute("aria-valuemax", f.total ?? 0);
      p.track.setAttribute("aria-valuenow", f.step);
      p.track.setAttribute("aria-valuetext", `step ${f.step} of ${f.total ?? "not known yet"}`);
      say(p.steps, f.total ? `${n.count(f.step)} / ${n.count(f.total)}` : n.count(f.step));
      const phase = { eval: "measuring held-out loss", sample: "writing samples", save: "saving a checkpoint" }[f.phase];
      say(p.left, isLive ? [timeLeft(f), phase].filter(Boolean).join(" · ") : "");
      say(p.safe, isLive ? "Safe to close this tab" : "");
      this.showPreparing(f);
      this.actions.update();
      this.state = f.state;
    }

    /** ① check ② load 62 % ③ tokenise 8,100/12,408 ④ first step */
    showPreparing(f) {
      const p = this.parts.preparing, isOn = f.state === "preparing" || (f.state === "running" && f.step === 0);
      p.hidden = !isOn;
      if (!isOn) return;
      const seen = this.model.of("phase").map((e) => e.name);
      const order = ["check", ...[...new Set(seen)].filter((name) => !["check", "train", "eval", "save", "sample"].includes(name)), "first step"];
      const at = f.state === "running" ? order.length - 1 : Math.max(order.indexOf(f.phase), 0);
      const n = signalbox.numbers;
      const items = order.map((name, i) => {
        const figures = i === at && f.of ? (f.of === 100 ? ` ${n.percent(f.done, f.of)}` : ` ${n.count(f.done)}/${n.count(f.of)}`) : "";
        return el(`li${i < at ? ".is-done" : i === at ? ".is-now" : ""}`, i === at ? { "aria-current": "step" } : {}, `${name}${figures}`);
      });
      p.replaceChildren(...items);
    }

    // ---- figures -----------------------------------------------------------------------------------------------

    showFigures() {
      const m = this.model, n = signalbox.numbers, f = this.parts.figure;
      const loss = m.series.loss?.y.length ? m.last(m.series.loss) : null;
      f.Loss(n.loss(loss), m.change() ?? "", Number.isNaN(loss) ? "bad" : "");
      const heldOut = m.status.held_out === undefined ? null : m.status.held_out;
      f["Held-out"](n.loss(heldOut), heldOut === null ? "not measured yet" : m.gap());
      const gpu = Boolean(m.heat.device_gib), column = gpu ? "device_gib" : "process_gib", isLive = m.isLive;
      const peak = known(m.peak(column)), used = isLive ? known(m.last(m.heat[column])) : peak;
      const limit = gpu ? known(m.last(m.heat.limit_gib)) : null;
      const text = limit === null ? n.memory(used) : `${used === null ? "–" : used.toFixed(1)} / ${n.memory(limit)}`;
      f.Memory(text, [isLive ? peak !== null && `peak ${n.memory(peak)}` : "peak of the run", !gpu && "main memory"].filter(Boolean).join(", "));
      say(this.memoryTitle, gpu ? "Memory, GiB" : "Memory of the process (on the CPU), GiB");
      const pace = isLive ? m.pace() : { text: "in the middle of the run", tone: "" };
      f.Speed(n.speed(known(isLive ? m.fast.speed : m.middleSpeed())), pace.text, pace.tone);
      if (this.lossChart.isDrawn) this.showLastValues(loss, heldOut, used);
    }

    showLastValues(loss, heldOut, used) {
      const n = signalbox.numbers, { fast, series } = this.model;
      const rows = [["Step", n.count(fast.step)], ["Loss", n.loss(loss)], ["Held-out loss", n.loss(heldOut)], ["Memory", n.memory(used)],
        ["Learning rate", n.rate(known(this.model.last(series.learning_rate)))], ["Gradient norm", n.grad_norm(known(this.model.last(series.grad_norm)))]];
      this.lastValues.replaceChildren(el("caption", "Last values"), el("tbody", rows.map(([name, value]) => el("tr", el("th", { scope: "row" }, name), el("td", value)))));
    }

    showEnd() {
      const { state } = this.model.fast, isEnd = !this.model.isLive && state !== "queued";
      const key = JSON.stringify([state, this.model.status, this.model.events.length]);
      this.parts.notice.hidden = !isEnd;
      this.parts.figures.hidden = ENDED_BADLY.includes(state);
      this.parts.progress.hidden = state === "finished" || ENDED_BADLY.includes(state);
      if (!isEnd || key === this.endKey) return;
      this.endKey = key;
      this.parts.notice.className = `sb-live-notice sb-panel sb-notice-${signalbox.tone(state)}`;
      this.parts.notice.replaceChildren(...signalbox.runEnd(this));
    }

    /** "Since you last looked (23:10): …", for somebody who was away more than ten minutes. */
    sinceLast() {
      const before = JSON.parse(localStorage.getItem(`signalbox.seen.${this.runId}`) ?? "null");
      const now = Date.now() / 1000, p = this.parts.back;
      if (this.hasGreeted || !before || now - before.at < 600) return;
      this.hasGreeted = true;
      const n = signalbox.numbers, since = this.model.events.filter((e) => e.t > before.at);
      const counted = (kind, word) => {
        const count = since.filter((e) => e.kind === kind).length;
        return count ? `${count} ${word}${count === 1 ? "" : "s"}` : null;
      };
      const loss = this.model.last(this.model.smoothed);
      const news = [`${n.count(Math.max(this.model.fast.step - before.step, 0))} steps`,
        before.loss !== null && Number.isFinite(loss) ? `loss ${n.loss(before.loss)} → ${n.loss(loss)}` : null,
        counted("checkpoint", "checkpoint"), counted("alert", "alert")].filter(Boolean);
      p.hidden = false;
      say(p, `Since you last looked (${n.when(before.at, now)}): ${news.join(" · ")}.`);
    }

    remember() {
      const seen = { at: Date.now() / 1000, step: this.model.fast.step, loss: known(this.model.last(this.model.smoothed)) };
      localStorage.setItem(`signalbox.seen.${this.runId}`, JSON.stringify(seen));
    }

    // ---- drawing -----------------------------------------------------------------------------------------------

    async draw(anew = false) {
      await this.plotly;
      const byTime = this.view.isByTime(this.model);
      const all = anew || this.isRedrawn || this.view.fit(this.model) || byTime !== this.wasByTime;
      this.isRedrawn = false;
      this.wasByTime = byTime;
      for (const b of this.axisSwitch.children) b.update();
      for (const chart of [this.lossChart, this.memoryChart]) await this.drawOne(chart, all);
      for (const chart of [this.rateChart, this.speedChart]) {
        if (chart.panel.open) await this.drawOne(chart, all);
      }
    }

    async drawOne(chart, anew) {
      await this.plotly;
      await chart.update(this.model, anew);
      chart.keys?.replaceChildren(...signalbox.charts.keys(chart));
    }

    async onTheme() {
      this.view.ink = signalbox.charts.readInk();
      if (this.lossChart?.isDrawn) await this.draw(true);
    }
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

  /** A small switch that shows whether it is on. */
  function toggle(word, isOn, change, after = () => {}) {
    const node = button(word, () => (change(), node.update(), after()), "", { class: "sb-button sb-live-toggle" });
    node.update = () => node.setAttribute("aria-pressed", String(isOn()));
    node.update();
    return node;
  }

  function timeLeft(f) {
    if (f.state !== "running") return "";
    if (f.eta_s === null) return "estimating the time left";
    const done = new Date(Date.now() + f.eta_s * 1000);
    const day = done.toDateString() === new Date().toDateString() ? "" : ` ${done.toLocaleDateString([], { weekday: "short" })}`;
    return `${signalbox.numbers.duration(f.eta_s)} left, done about${day} ${clock(done.getTime() / 1000)}`;
  }

  let loading = null;
  function loadOnce(address) {
    loading ??= new Promise((resolve, reject) => {
      const script = el("script", { src: address });
      script.onload = resolve;
      script.onerror = () => reject(new Error("plotly.js did not load"));
      document.head.append(script);
    });
    return loading;
  }

  signalbox.live = (element, settings) => new LiveBoard(element, settings);
  signalbox.clock = clock;
})();
