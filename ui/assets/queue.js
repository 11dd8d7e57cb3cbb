// The queue above the list of runs: what is trained next, in which order, and whether it goes on by itself.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button, send } = signalbox;

  /** `changed()` is called after each act, so that the list asks the server at once. */
  class QueuePanel {
    constructor(changed) {
      this.changed = changed;
      this.refusal = el("p.sb-message", { role: "alert" });
      this.list = el("ol.sb-queue-list");
      this.state = el("p.sb-help", { role: "status" });
      this.hold = button("Hold the queue", () => this.act({ act: this.isHeld ? "go" : "hold" }), "", { class: "sb-button sb-small" });
      const head = el("div.sb-queue-head", el("h2.sb-section", "Queue"), this.state, this.hold);
      this.root = el("section.sb-panel.sb-queue", { "aria-label": "Queue" }, head, this.list, this.refusal);
      this.root.hidden = true;
    }

    /** `queue` as api/runs tells it, `runs` by id, `mayChange`: whether this person may. */
    show(queue, runs, mayChange) {
      this.isHeld = Boolean(queue.held_by);
      const waiting = queue.order.map((id) => runs.get(id)).filter(Boolean);
      this.root.hidden = !waiting.length && !queue.fault && !this.isHeld;
      const held = `Held by ${queue.held_by}: nothing starts by itself.`;
      const goesOn = waiting.length ? "The next run starts when the device is free." : "";
      signalbox.say(this.state, queue.fault || (this.isHeld ? held : goesOn));
      signalbox.say(this.hold, this.isHeld ? "Let it go on" : "Hold the queue");
      this.hold.hidden = !mayChange || Boolean(queue.fault);
      const focused = document.activeElement?.dataset?.key;
      this.list.replaceChildren(...waiting.map((run, at) => this.row(run, at, waiting.length, mayChange)));
      if (focused) this.list.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
    }

    row(run, at, count, mayChange) {
      const small = (word, label, key, disabled, request) =>
        button(word, () => this.act({ ...request, run_id: run.run_id }), "", {
          class: "sb-button sb-small", "aria-label": `${label}: ${run.name}`, disabled, data: { key: `${key} ${run.run_id}` },
        });
      const what = run.state === "queued" ? run.model : `goes on from step ${signalbox.numbers.count(run.step)}`;
      return el("li",
        el("a", { href: `live?run=${encodeURIComponent(run.run_id)}` }, run.name || run.run_id),
        el("span.sb-help", what),
        mayChange && el("span.sb-queue-acts",
          small("↑", "Earlier", "up", at === 0, { act: "move", place: at - 1 }),
          small("↓", "Later", "down", at === count - 1, { act: "move", place: at + 1 }),
          small("Remove", "Out of the queue", "out", false, { act: "remove" })));
    }

    async act(request) {
      try {
        await send("api/queue", request);
        this.refusal.textContent = "";
      } catch (error) {
        this.refusal.textContent = error.message;
      }
      this.changed();
    }
  }

  signalbox.QueuePanel = QueuePanel;
})();
