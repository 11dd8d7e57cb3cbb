// The live board of one run: which run it is, what an answer of the feed changes, and when the charts are drawn.
// Everything shown comes from the feed; nothing is kept here that a second tab would not see too.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, say } = signalbox;
  const ENDED_BADLY = ["failed", "diverged", "interrupted"];
  const SILENT_AFTER_S = 3;

  class LiveBoard {
    /** `plotly` is the address of plotly.js. The run comes from the page's address, else it is the one in training. */
    constructor(element, { plotly }) {
      this.root = element;
      this.plotly = loadOnce(plotly);
      this.runId = new URLSearchParams(location.search).get("run");
      document.addEventListener("signalbox:state", (event) => this.onMachine(event.detail));
      const theme = new MutationObserver(() => this.onTheme());
      theme.observe(document.body, { attributes: true, attributeFilter: ["class"] });
      if (this.runId) this.follow(this.runId);
      else this.idle();
    }

    /** Show the run `runId` from its first point on. */
    follow(runId) {
      this.poller?.stop();
      this.runId = runId;
      this.cursor = this.mark = "";
      this.model = new signalbox.RunModel();
      this.view = new signalbox.charts.View();
      this.drawing = Promise.resolve();
      this.isRedrawn = true;
      signalbox.buildBoard(this);
      // location.pathname, since the page has a <base> that a bare "?run=" would be resolved against
      history.replaceState(null, "", `${location.pathname}?run=${encodeURIComponent(runId)}`);
      this.poller = new signalbox.Poller(this.root, {
        address: () => `${this.base}/feed?gen=${this.model.fast.gen ?? ""}&since=${this.cursor}&h=${this.mark}`,
        onAnswer: (answer) => this.onAnswer(answer),
        onSilence: (since) => this.onSilence(since),
        onGone: (sentence) => this.onGone(sentence),
      });
    }

    get base() {
      return `api/runs/${encodeURIComponent(this.runId)}`;
    }

    // ---- without a run, or beside another -----------------------------------------------------------------------

    /** No run: filled by the header's news of the machine. */
    idle() {
      this.idleText = el("p", "Looking …");
      const start = el("a.sb-button.sb-primary", { href: "./" }, "Start a run");
      this.root.replaceChildren(el("section.sb-panel.sb-live-idle", { role: "status" }, this.idleText, start));
    }

    onGone(sentence) {
      const all = el("a", { href: "runs" }, "All runs");
      this.root.replaceChildren(el("section.sb-panel.sb-live-idle", el("p", sentence), all));
    }

    onMachine(state) {
      this.hasTerminal = state.terminal;
      if (this.runId) this.showElsewhere(state.run);
      else if (state.run) this.follow(state.run.run_id);
      else this.showIdle(state);
    }

    showIdle({ machine, last, advice, next }) {
      const parts = [`Idle · ${machine}`];
      if (last) {
        const ended = last.ended_at ? ` ${signalbox.clock(last.ended_at)}` : "";
        parts.push(" · ", el("a", { href: runAddress(last.run_id) }, `Last: ${last.state}${ended} ▸`));
      }
      if (next) parts.push(" · ", el("a", { href: "runs" }, `Next in the queue: ${next.name}${next.held ? " (held)" : ""} ▸`));
      if (advice) parts.push(el("span.sb-tone-warn", ` ${advice}`));
      this.idleText.replaceChildren(...parts);
    }

    /** "You are looking at a finished run (12 Nov). Running now: … ▸" */
    showElsewhere(other) {
      const { state = "", } = this.model.fast, { ended_at: ended } = this.model.status;
      this.parts.elsewhere.hidden = !other || other.run_id === this.runId || this.model.isLive || !state;
      if (this.parts.elsewhere.hidden) return;
      const when = ended ? ` (${signalbox.numbers.when(ended, Date.now() / 1000)})` : "";
      const article = state.startsWith("i") ? "an" : "a";
      say(this.parts.elsewhereText, `You are looking at ${article} ${state} run${when}. Running now: `);
      say(this.parts.elsewhereLink, `${other.name} ▸`);
      this.parts.elsewhereLink.href = runAddress(other.run_id);
    }

    // ---- an answer ---------------------------------------------------------------------------------------------

    async onAnswer(answer) {
      const { gen } = this.model.fast;
      const { reset, events } = this.model.apply(answer);
      this.cursor = this.model.isHeavy ? "" : answer.next;
      this.mark = answer.h ?? this.mark;
      this.isRedrawn ||= reset || gen !== answer.gen;
      this.poller.isAtRest = !this.model.isLive;
      this.parts.silence.hidden = true;
      this.root.classList.remove("is-silent");
      signalbox.showHead(this);
      signalbox.showFigures(this);
      this.showEnd();
      this.panels.update({ reset, events });
      signalbox.showSinceLast(this);
      await this.draw();
    }

    onSilence(since) {
      const silent = (Date.now() - since) / 1000;
      if (silent < SILENT_AFTER_S) return;
      this.root.classList.add("is-silent");
      this.parts.silence.hidden = false;
      const age = signalbox.numbers.duration(silent);
      say(this.parts.silence, `No answer since ${signalbox.clock(since / 1000)} (${age}). Trying again.`);
    }

    showEnd() {
      const { state } = this.model.fast, { parts } = this;
      const isEnd = !this.model.isLive && state !== "queued";
      parts.notice.hidden = !isEnd;
      parts.figures.hidden = ENDED_BADLY.includes(state);
      parts.progress.hidden = state === "finished" || ENDED_BADLY.includes(state);
      const key = JSON.stringify([state, this.model.status, this.model.events.length]);
      if (!isEnd || key === this.endKey) return;
      this.endKey = key;
      parts.notice.className = `sb-live-notice sb-panel sb-notice-${signalbox.tone(state)}`;
      parts.notice.replaceChildren(...signalbox.runEnd(this));
    }

    // ---- drawing -----------------------------------------------------------------------------------------------

    /** Bring the charts up to date, one drawing after another; `anew` draws all of them from the beginning. */
    draw(anew = false) {
      this.isRedrawn ||= anew;
      this.drawing = this.drawing.then(() => this.drawNow());
      return this.drawing;
    }

    async drawNow() {
      await this.plotly;
      const byTime = this.view.isByTime(this.model), isOtherUnit = this.view.fit(this.model);
      const all = this.isRedrawn || isOtherUnit || byTime !== this.wasByTime;
      this.isRedrawn = false;
      this.wasByTime = byTime;
      for (const node of this.axisSwitch.children) node.update();
      for (const chart of this.view.charts) {
        if (!chart.panel || chart.panel.open) await chart.update(this.model, all);
      }
    }

    async onTheme() {
      if (!this.view) return;
      this.view.ink = signalbox.charts.readInk();
      await this.draw(true);
    }
  }

  const runAddress = (runId) => `live?run=${encodeURIComponent(runId)}`;

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
})();
