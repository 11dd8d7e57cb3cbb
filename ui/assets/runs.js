// All runs of the workspace: find one, open it, resume it, name it, delete it by typing its name.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button, chip, send, say } = signalbox;
  const LIVE = ["preparing", "running", "pausing", "stopping"];
  const GROUPS = {
    All: () => true,
    "Going on": (run) => ["queued", "paused", ...LIVE].includes(run.state),
    Finished: (run) => ["finished", "stopped"].includes(run.state),
    "Needs a look": (run) => ["failed", "diverged", "interrupted"].includes(run.state),
  };
  const METHODS = { lora: "LoRA", qlora: "QLoRA", full: "full" };
  const title = (run) => run.name || run.run_id;
  const figure = (value) => (value === null || value === undefined ? -Infinity : signalbox.numbers.number(value));
  // heading, what it sorts by (null: not at all), class of its cells
  const COLUMNS = [
    ["State", (run) => run.state, ""],
    ["Name", (run) => title(run).toLowerCase(), ""],
    ["Model, data, profile", (run) => `${run.model} ${run.data}`.toLowerCase(), ""],
    ["Steps", (run) => figure(run.step), ".sb-right"],
    ["Loss, best held-out", (run) => figure(run.loss), ".sb-right"],
    ["Peak memory", (run) => figure(run.peak_gib), ".sb-right"],
    ["When, how long", (run) => figure(run.began), ".sb-right"],
    ["Disk", (run) => figure(run.bytes), ".sb-right"],
    ["", null, ".sb-right"],
  ];
  const BY_TIME = 6;
  const AGES_MS = 30_000;
  const base = (run) => `api/runs/${encodeURIComponent(run.run_id)}`;
  const board = (run) => `live?run=${encodeURIComponent(run.run_id)}`;

  class RunsList {
    constructor(element) {
      this.root = element;
      this.runs = [];
      this.may = {};
      this.mark = "";
      this.waiting = [];
      this.group = "All";
      this.order = { by: BY_TIME, down: true };
      this.build();
      this.poller = new signalbox.Poller(element, {
        address: () => `api/runs?h=${this.mark}`,
        onAnswer: (answer) => this.onAnswer(answer),
        onSilence: (since) => this.onSilence(since),
        onGone: (sentence) => say(this.said, sentence),
      });
      this.poller.isAtRest = true;
    }

    build() {
      const find = { type: "search", placeholder: "Find by name, model, data …", "aria-label": "Find a run" };
      this.search = el("input.sb-input", find);
      this.search.addEventListener("input", () => this.show());
      this.groups = Object.keys(GROUPS).map((name) => {
        const settings = { class: "sb-button sb-runs-group" };
        return [name, button(name, () => this.choose(name), "", settings)];
      });
      this.heads = COLUMNS.map(([name, key, kind], at) => {
        const sorter = key && el("button.sb-runs-sort", { type: "button", onclick: () => this.sort(at) }, name);
        return el(`th${kind}`, { scope: "col" }, sorter || el("span.sb-hidden", "Actions"));
      });
      this.said = el("p.sb-help", { role: "status" });
      this.body = el("tbody");
      const caption = el("caption.sb-hidden", "Runs");
      this.table = el("table.sb-table.sb-runs-table", caption, el("thead", el("tr", this.heads)), this.body);
      this.dialog = el("dialog.sb-runs-dialog", { "aria-labelledby": "sb-runs-title" });
      const nodes = this.groups.map(([, node]) => node);
      const which = el("div.sb-runs-groups", { role: "group", "aria-label": "Which runs" }, nodes);
      const head = el("div.sb-runs-head", el("h1.sb-title", "Runs"), el("div.sb-runs-tools", this.search, which));
      const panel = el("section.sb-panel.sb-runs-panel", this.table, this.said);
      this.queue = new signalbox.QueuePanel(() => this.poller.soon());
      this.root.replaceChildren(el("div.sb-runs", head, this.queue.root, panel, this.dialog));
    }

    onAnswer(answer) {
      this.root.classList.remove("is-silent");
      this.mark = answer.h;
      if (answer.runs) {
        this.runs = answer.runs;
        this.may = answer.may;
        this.waiting = answer.queue.order;
        this.queue.show(answer.queue, new Map(answer.runs.map((run) => [run.run_id, run])), answer.may.queue);
      }
      // an unchanged list is left alone, so that a click never meets a row that was just replaced; ages are told anew
      if (answer.runs || Date.now() - this.shownAt > AGES_MS) this.show();
    }

    onSilence(since) {
      this.root.classList.add("is-silent");
      say(this.said, `No answer for ${signalbox.numbers.duration((Date.now() - since) / 1000)}. Trying again.`);
    }

    choose(name) {
      this.group = name;
      this.show();
    }

    sort(at) {
      const down = this.order.by === at ? !this.order.down : at >= 3;
      this.order = { by: at, down };
      this.show();
    }

    /** The runs of the group that hold every word searched for, in order. */
    get chosen() {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const fits = (run) => {
        const parts = [run.run_id, run.name, run.why, run.model, run.data, run.profile, run.state, run.method];
        const text = parts.join(" ").toLowerCase();
        return GROUPS[this.group](run) && words.every((word) => text.includes(word));
      };
      const key = COLUMNS[this.order.by][1], sign = this.order.down ? -1 : 1;
      const compare = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * sign;
      return this.runs.filter(fits).sort(compare);
    }

    show() {
      this.shownAt = Date.now();
      const runs = this.chosen, focused = document.activeElement?.dataset?.key;
      for (const [name, node] of this.groups) {
        say(node, `${name} ${this.runs.filter(GROUPS[name]).length}`);
        node.setAttribute("aria-pressed", String(name === this.group));
      }
      this.heads.forEach((head, at) => {
        const direction = this.order.down ? "descending" : "ascending";
        head.setAttribute("aria-sort", at === this.order.by ? direction : "none");
      });
      this.body.replaceChildren(...runs.map((run) => this.row(run)));
      this.table.hidden = !runs.length;
      if (focused) this.body.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
      const none = ["No runs yet. ", el("a", { href: "./" }, "Start one on Train"), "."];
      if (!this.runs.length) this.said.replaceChildren(...none);
      else say(this.said, runs.length ? "" : "No run fits. Clear the search, or choose All.");
    }

    // ---- one line --------------------------------------------------------------------------------------------

    row(run) {
      const n = signalbox.numbers, help = (text) => text && el("p.sb-help", text);
      const method = run.method && (run.method === "full" ? "full" : `${METHODS[run.method]} r${run.rank}`);
      const made = [(run.data ?? []).join(", "), run.profile ?? "no profile", method].filter(Boolean).join(" · ");
      const of = run.total && run.total !== run.step ? ` / ${n.count(run.total)}` : "";
      const began = run.began && new Date(run.began * 1000).toISOString();
      const cells = [
        [chip(run.state, this.word(run))],
        [el("a", { href: board(run), data: { key: `open ${run.run_id}` } }, title(run)), help(run.why), help(run.cause)],
        [run.model || "–", help(made)],
        [`${n.count(run.step)}${of}`],
        [n.loss(run.loss), help(`best ${n.loss(run.best)}`)],
        [n.memory(run.peak_gib === "nan" ? null : run.peak_gib)],
        [el("time", { title: began }, n.when(run.began, Date.now() / 1000)), help(n.duration(run.seconds))],
        [n.disk(run.bytes)],
        [this.actions(run)],
      ];
      return el("tr", cells.map((content, at) => {
        const [name, , kind] = COLUMNS[at];
        return el(`td${kind}`, { data: { title: name } }, content.filter(Boolean));
      }));
    }

    /** A run that was made and never begun is queued only while it stands in the queue. */
    word(run) {
      return run.state === "queued" && !this.waiting.includes(run.run_id) ? "not started" : run.state;
    }

    actions(run) {
      const act = (word, key, onclick) => {
        const settings = { class: "sb-button sb-small", data: { key: `${key} ${run.run_id}` } };
        return button(word, onclick, "", settings);
      };
      const canResume = this.may.resume && run.allowed.includes("resume") && run.saved_step !== null;
      const canDelete = this.may.delete && run.to_type && !LIVE.includes(run.state);
      const canWait = run.state === "queued" || (run.allowed.includes("resume") && run.saved_step !== null);
      // where nothing is in its way a run is simply resumed
      const hasToWait = this.waiting.length > 0 || run.state === "queued" || this.runs.some((r) => LIVE.includes(r.state));
      const canQueue = this.may.queue && canWait && hasToWait && !this.waiting.includes(run.run_id);
      return el("span.sb-runs-actions",
        canQueue && act("Add to queue", "queue", () => this.queue.act({ act: "add", run_id: run.run_id })),
        canResume && act("Resume", "resume", () => this.resume(run)),
        this.may.note && run.to_type && act("Name …", "name", () => this.rename(run)),
        canDelete && act("Delete …", "delete", () => this.confirm(run)));
    }

    async resume(run) {
      try {
        await send(`${base(run)}/command`, { command: "resume" });
        location.href = board(run);
      } catch (error) {
        this.ask("Cannot resume", [el("p", error.message)], []);
      }
    }

    rename(run) {
      const name = el("input.sb-input", { type: "text", value: run.name, maxlength: 80 });
      const why = el("input.sb-input", { type: "text", value: run.why, maxlength: 500 });
      const save = () => send(`${base(run)}/notes`, { name: name.value, why: why.value });
      this.ask("Name and purpose", [el("label", "Name", name), el("label", "Why", why)], [["Save", "primary", save]]);
    }

    confirm(run) {
      const size = signalbox.numbers.disk(run.bytes);
      const settings = { type: "text", autocomplete: "off", spellcheck: "false", "aria-label": "The run's name" };
      const typed = el("input.sb-input", settings);
      const content = [
        el("p", `Deletes its curve, its log and every checkpoint: ${size}. This cannot be undone.`),
        el("p", "Type the name to confirm:"),
        el("p", el("code", run.to_type)),
        typed,
      ];
      const remove = () => send(`${base(run)}/delete`, { name: typed.value });
      this.ask(`Delete ${title(run)}?`, content, [["Delete", "danger", remove]]);
      const act = this.dialog.querySelector(".sb-danger");
      const fits = () => (act.disabled = typed.value.trim() !== run.to_type);
      typed.addEventListener("input", fits);
      fits();
      typed.focus();
    }

    /** A dialog with a heading, its content, and its actions; a refusal is shown in it. */
    ask(heading, content, actions) {
      const refusal = el("p.sb-tone-bad", { role: "alert" });
      const close = () => this.dialog.close();
      const attempt = (act) => async ({ target }) => {
        target.disabled = true;
        try {
          await act();
          close();
          this.poller.soon();
        } catch (error) {
          refusal.textContent = error.message;
          target.disabled = false;
        }
      };
      const buttons = actions.map(([word, kind, act]) => button(word, attempt(act), kind));
      const row = el("div.sb-runs-buttons", button(actions.length ? "Cancel" : "Close", close), buttons);
      this.dialog.replaceChildren(el("h2", { id: "sb-runs-title" }, heading), ...content, refusal, row);
      this.dialog.showModal();
    }
  }

  signalbox.runs = (element) => new RunsList(element);
})();
