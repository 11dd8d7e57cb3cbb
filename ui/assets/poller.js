// Asks the feed once a second while somebody is looking, less often when the server is silent, never twice at once.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const EVERY_MS = 1000;
  const AT_REST_MS = 5000;
  const SLOWEST_MS = 15_000;
  const PATIENCE_MS = 10_000;

  class Poller {
    /** `address()` gives the next address; `onAnswer(json)`, `onSilence(sinceMs)`, `onGone(sentence)` hear of it. */
    constructor(element, { address, onAnswer, onSilence, onGone }) {
      Object.assign(this, { element, address, onAnswer, onSilence, onGone });
      this.failures = 0;
      this.lastAnswer = Date.now();
      this.isAtRest = false;
      this.onVisible = () => document.visibilityState === "visible" && this.soon();
      document.addEventListener("visibilitychange", this.onVisible);
      this.soon();
    }

    /** Ask now (or as soon as the answer under way is in). */
    soon() {
      this.isWanted = true;
      clearTimeout(this.timer);
      if (!this.isAsking) this.timer = setTimeout(() => this.ask(), 0);
    }

    stop() {
      this.isStopped = true;
      clearTimeout(this.timer);
      document.removeEventListener("visibilitychange", this.onVisible);
    }

    async ask() {
      if (this.isStopped || !this.element.isConnected) return this.stop();
      if (document.visibilityState !== "visible") return; // visibilitychange wakes it
      const began = Date.now();
      this.isAsking = true;
      this.isWanted = false;
      const answer = await this.fetch();
      this.isAsking = false;
      this.plan(began);
      if (answer) await this.onAnswer(answer);
      else if (!this.isStopped) this.onSilence(this.lastAnswer);
    }

    /** The answer, or null when there is none. */
    async fetch() {
      try {
        const reply = await fetch(this.address(), { signal: AbortSignal.timeout(PATIENCE_MS) });
        if (reply.status === 404 || reply.status === 403) {
          this.stop();
          this.onGone((await reply.json()).error);
          return null;
        }
        if (!reply.ok) throw new TypeError(`status ${reply.status}`);
        const answer = await reply.json();
        this.failures = 0;
        this.lastAnswer = Date.now();
        return answer;
      } catch (error) {
        // what fetch and json throw when the server is away; anything else is a fault of ours and must be seen
        if (!(error instanceof TypeError || error instanceof DOMException || error instanceof SyntaxError)) throw error;
        this.failures += 1;
        return null;
      }
    }

    plan(began) {
      if (this.isStopped) return;
      const calm = (this.isAtRest ? AT_REST_MS : EVERY_MS) - (Date.now() - began);
      const wait = this.failures ? Math.min(EVERY_MS * 2 ** (this.failures - 1), SLOWEST_MS) : calm;
      this.timer = setTimeout(() => this.ask(), this.isWanted ? 0 : Math.max(wait, 50));
    }
  }

  signalbox.Poller = Poller;
})();
