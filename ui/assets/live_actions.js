// What a person may do with the run now: the row of buttons, the three choices of Stop, and the refusal if there is one.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button, send } = signalbox;

  class RunActions {
    constructor(board) {
      this.board = board;
      this.question = null;
      this.refusal = null;
      this.sent = null;
      this.row = el("div.sb-live-actions", { role: "group", "aria-label": "Actions on this run" });
    }

    get model() {
      return this.board.model;
    }

    /** Draw the row when something it shows has changed. */
    update(anew = false) {
      const { status, fast } = this.model;
      if (this.sent && this.sent.state !== fast.state) this.sent = null;
      const step = this.question && fast.step; // the choices of Stop name the steps that would be lost
      const text = JSON.stringify([fast.state, status.allowed, step, this.saveTime(), this.refusal, this.sent]);
      if (!anew && text === this.shown) return;
      const focused = [...this.row.querySelectorAll("button")].findIndex((b) => b === document.activeElement);
      this.shown = text;
      this.row.replaceChildren(...this.content(new Set(status.allowed ?? [])).filter(Boolean));
      if (focused >= 0) this.row.querySelectorAll("button")[focused]?.focus();
    }

    content(may) {
      const refusal = this.refusal && el("p.sb-live-refusal.sb-tone-bad", { role: "alert" }, this.refusal);
      if (this.question === "stop" && may.has("stop")) return [...this.stopChoices(), refusal];
      if (this.question === "discard" && may.has("stop-now")) return [...this.discardChoices(), refusal];
      const can = (command, word, kind, act) =>
        may.has(command) && button(word, act ?? (() => this.command(command)), kind, { disabled: this.sent !== null });
      const isLeaving = ["pausing", "stopping"].includes(this.model.fast.state), discard = `${this.discardWord()}…`;
      return [
        isLeaving && el("span.sb-help", { role: "status" }, this.leaving()),
        can("pause", "Pause"),
        can("checkpoint", "Save checkpoint"),
        can("stop", "Stop", "danger", () => this.ask("stop")),
        isLeaving && this.lost() > 0 && can("stop-now", discard, "danger", () => this.ask("discard")),
        refusal,
      ];
    }

    leaving() {
      const { state, step } = this.model.fast, time = this.saveTime();
      const word = state === "pausing" ? "Pausing" : "Stopping";
      const discards = this.model.latest("stopping")?.now;
      if (discards || step === 0) return `${word} …`;
      return `${word}: finishing step ${signalbox.numbers.count(step + 1)}, then saving${time && ` (${time})`}.`;
    }

    stopChoices() {
      const hasSteps = this.model.fast.step > 0, time = this.saveTime();
      return [
        el("span", "Stop:"),
        button(hasSteps ? `Save and stop${time && `, ${time}`}` : "Stop now", () => this.command("stop"), "primary"),
        hasSteps && this.lost() > 0 && button(`${this.discardWord()}…`, () => this.ask("discard"), "danger"),
        button("Keep running", () => this.ask(null)),
      ];
    }

    discardChoices() {
      const saved = this.model.status.saved_step;
      const kept = saved ? `Step ${signalbox.numbers.count(saved)} stays.` : "Nothing of this run is saved yet.";
      return [
        el("span", `${this.discardWord()}? ${kept}`),
        button(this.discardWord(), () => this.command("stop-now"), "danger"),
        button(this.model.fast.state === "running" ? "Keep running" : "Keep them", () => this.ask(null)),
      ];
    }

    lost() {
      return this.model.fast.step - (this.model.status.saved_step ?? 0);
    }

    discardWord() {
      const lost = this.lost();
      return `Discard ${signalbox.numbers.count(lost)} step${lost === 1 ? "" : "s"}`;
    }

    /** "about 4 s", from the last save of this run and the step under way; "" before anything was saved. */
    saveTime() {
      const seconds = this.model.latest("checkpoint")?.seconds;
      return seconds === undefined ? "" : `about ${signalbox.numbers.duration(seconds + this.model.secondsAStep())}`;
    }

    ask(question) {
      this.question = question;
      this.refusal = null;
      this.update(true);
      this.row.querySelector("button")?.focus();
    }

    async command(command) {
      this.question = this.refusal = null;
      this.sent = { command, state: this.model.fast.state };
      this.update(true);
      try {
        await send(`${this.board.base}/command`, { command });
        if (command === "checkpoint") this.sent = null;
      } catch (error) {
        this.refusal = error.message;
        this.sent = null;
      }
      this.update(true);
      this.board.poller.soon();
    }
  }

  signalbox.RunActions = RunActions;
})();
