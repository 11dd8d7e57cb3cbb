// Beside and below the charts: what needs a look, events, and the tabs Samples, Rows, Log, Settings, Checkpoints.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button, send, say } = signalbox;
  const TABS = ["Samples", "Rows", "Log", "Settings", "Checkpoints"];
  const LOG_LINES = 500;
  const ALARMS = ["alert", "oom_rung", "rewind", "bad_row"];
  // kind of event -> how it is told in the Events box; kinds that are missing here are told elsewhere or not at all
  const TOLD = {
    started: () => "started",
    resumed: (e) => (e.auto ? "went on by itself" : "resumed"),
    cut_off: (e) => (e.cause ? `cut off: ${e.cause}` : "cut off"),
    running: (e) => (e.step ? `training from step ${e.step}` : "training began"),
    checkpoint: (e, n) => `saved ${n.count(e.step)} (${n.disk(e.bytes)}, ${n.duration(e.seconds)})`,
    eval: (e, n) => `held-out ${n.loss(e.loss)} at ${n.count(e.step)}${e.best ? ", best" : ""}`,
    sample: (e, n) => `samples at ${n.count(e.step)}`,
    oom_rung: (e, n) => `out of memory at ${n.count(e.step)}, went on smaller`,
    rewind: (e, n) => `went back to ${n.count(e.step)}`,
    bad_row: (e, n) => `${e.file} line ${n.count(e.line)} left out from ${n.count(e.step)} on`,
    pausing: (e) => `pause asked by ${e.by}`,
    stopping: (e) => `stop asked by ${e.by}`,
    paused: (e, n) => `paused at ${n.count(e.step)}`,
    stopped: (e, n) => `stopped at ${n.count(e.step)}`,
    finished: () => "finished",
    failed: () => "failed",
    diverged: (e, n) => `diverged at ${n.count(e.step)}`,
  };

  class LivePanels {
    constructor(board) {
      this.board = board;
      this.chosen = "Samples";
      this.step = null;
    }

    get model() {
      return this.board.model;
    }

    // ---- the side ----------------------------------------------------------------------------------------------

    /** The column beside the charts. */
    side() {
      this.alarmTitle = el("h2", "Needs a look");
      this.alarms = el("ul.sb-live-list");
      this.happened = el("ol.sb-live-list");
      return el("aside.sb-live-side",
        el("section.sb-panel.sb-live-alarms", { "aria-label": "Needs a look" }, this.alarmTitle, this.alarms),
        el("section.sb-panel.sb-live-events", { "aria-label": "Events" }, el("h2", "Events"), this.happened));
    }

    /** Take in an answer: `reset` means that all events are new. */
    update({ reset, events }) {
      const seen = new Set(this.model.status.seen ?? []), seenText = JSON.stringify([...seen]);
      if (reset || events.some((e) => e.kind in TOLD)) this.showEvents();
      if (reset || seenText !== this.seenText || events.some((e) => ALARMS.includes(e.kind))) this.showAlarms(seen);
      this.seenText = seenText;
      if (reset || events.some((e) => e.kind === "log")) this.showLog(reset ? null : events);
      if (reset || events.some((e) => e.kind === "sample")) this.showSamples();
      if (events.some((e) => e.kind === "checkpoint") && this.chosen === "Checkpoints") this.load("Checkpoints");
    }

    showEvents() {
      const n = signalbox.numbers;
      const all = this.model.events.filter((e) => e.kind in TOLD);
      // a step writes several samples; one line says so
      const isFirst = (e, i) => e.kind !== "sample" || all[i - 1]?.kind !== "sample" || all[i - 1].step !== e.step;
      const told = all.filter(isFirst).slice(-100).reverse();
      this.happened.replaceChildren(...told.map((e) => {
        const time = el("time", { title: new Date(e.t * 1000).toISOString() }, signalbox.clock(e.t));
        return el("li", time, el("span", TOLD[e.kind](e, n)));
      }));
    }

    showAlarms(seen) {
      const open = this.model.of(...ALARMS).filter((e) => !seen.has(e.n)).reverse();
      say(this.alarmTitle, open.length ? `Needs a look (${open.length})` : "Needs a look");
      const rows = open.slice(0, 20).map((e) => el("li.sb-live-alarm", signalbox.glyph("warning"),
        el("span", e.text ?? `${e.code ?? e.kind}, step ${e.step}`),
        e.step > 0 && button("Rows", () => this.showRows(e.step), "", { class: "sb-button sb-small" }),
        this.model.status.may_note && button("Seen", () => this.markSeen([e.n]), "", { class: "sb-button sb-small" })));
      this.alarms.replaceChildren(...(rows.length ? rows : [el("li.sb-help", "Nothing.")]));
    }

    async markSeen(numbers) {
      await send(`${this.board.base}/notes`, { seen: numbers });
      this.board.poller.soon();
    }

    // ---- the tabs ----------------------------------------------------------------------------------------------

    /** The row of tabs with their panels, full width. */
    tabs() {
      this.tabOf = {};
      this.panelOf = {};
      for (const name of TABS) {
        const tab = { type: "button", role: "tab", id: `sb-tab-${name}`, "aria-controls": `sb-panel-${name}` };
        const panel = { role: "tabpanel", id: `sb-panel-${name}`, "aria-labelledby": `sb-tab-${name}`, tabindex: 0 };
        this.tabOf[name] = el("button.sb-tab", tab, name === "Rows" ? "Rows at step …" : name);
        this.tabOf[name].addEventListener("click", () => this.open(name, false));
        this.panelOf[name] = el("div.sb-live-tabpanel", panel);
      }
      const list = el("div.sb-tabs", { role: "tablist", "aria-label": "More about this run" }, Object.values(this.tabOf));
      list.addEventListener("keydown", (event) => this.onKey(event));
      this.buildLog();
      this.buildRows();
      this.section = el("section.sb-panel.sb-live-more-tabs", list, TABS.map((name) => this.panelOf[name]));
      this.show();
      return this.section;
    }

    onKey(event) {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = TABS[(TABS.indexOf(this.chosen) + move + TABS.length) % TABS.length];
      this.open(next, false);
      this.tabOf[next].focus();
    }

    show() {
      for (const name of TABS) {
        const isChosen = name === this.chosen;
        this.tabOf[name].setAttribute("aria-selected", String(isChosen));
        this.tabOf[name].tabIndex = isChosen ? 0 : -1;
        this.panelOf[name].hidden = !isChosen;
      }
    }

    /** Choose a tab; `scroll` brings it into view. */
    open(name, scroll = true) {
      this.chosen = name;
      this.show();
      if (name === "Settings" || name === "Checkpoints") this.load(name);
      if (name === "Log" && this.follow.checked) this.log.scrollTop = this.log.scrollHeight;
      if (scroll) this.section.scrollIntoView({ block: "start" });
    }

    async load(name) {
      const panel = this.panelOf[name];
      try {
        const answer = await send(`${this.board.base}/${name.toLowerCase()}`);
        panel.replaceChildren(...signalbox.runTabs[name](answer, this.board.base, () => this.load(name)));
      } catch (error) {
        panel.replaceChildren(el("p.sb-tone-bad", error.message));
      }
    }

    showSamples() {
      const samples = this.model.of("sample");
      this.panelOf.Samples.replaceChildren(...signalbox.runTabs.Samples(samples));
    }

    buildLog() {
      this.log = el("pre.sb-live-log", { tabindex: 0, "aria-label": "Log" });
      this.follow = el("input", { type: "checkbox", checked: true });
      this.follow.addEventListener("change", () => this.follow.checked && (this.log.scrollTop = this.log.scrollHeight));
      this.panelOf.Log.append(el("label.sb-live-follow", this.follow, " Follow"), this.log);
    }

    showLog(events) {
      if (events === null) this.log.replaceChildren();
      const fresh = (events ?? this.model.events).filter((e) => e.kind === "log");
      this.log.append(...fresh.map((e) => `${signalbox.clock(e.t)}  ${e.text}\n`));
      while (this.log.childNodes.length > LOG_LINES) this.log.firstChild.remove();
      if (this.follow.checked) this.log.scrollTop = this.log.scrollHeight;
    }

    buildRows() {
      this.stepInput = el("input.sb-input", { type: "number", min: 1, inputmode: "numeric", "aria-label": "Step" });
      const show = el("button.sb-button", { type: "submit" }, "Show");
      const form = el("form.sb-live-rowsform", "Rows of step ", this.stepInput, show);
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        this.showRows(Number(this.stepInput.value), false);
      });
      this.rows = el("div", el("p.sb-help", "Choose a step, or click a point of the loss curve."));
      this.panelOf.Rows.append(form, this.rows);
    }

    /** The rows that one step trained on, with their own loss. */
    async showRows(step, scroll = true) {
      if (!Number.isInteger(step) || step < 1) return;
      this.stepInput.value = step;
      this.open("Rows", scroll);
      try {
        const answer = await send(`${this.board.base}/rows?step=${step}`);
        this.rows.replaceChildren(...signalbox.runTabs.Rows(answer, this.board.base));
      } catch (error) {
        this.rows.replaceChildren(el("p.sb-tone-bad", error.message));
      }
    }
  }

  signalbox.LivePanels = LivePanels;
})();
