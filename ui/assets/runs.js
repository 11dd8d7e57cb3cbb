// All runs of the workspace: find one, open it, resume it, name it, delete it by typing its name.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button, chip, send, say } = signalbox;
  const GROUPS = {
    All: () => true,
    "Going on": (run) => ["queued", "preparing", "running", "pausing", "stopping", "paused"].includes(run.state),
    Finished: (run) => ["finished", "stopped"].includes(run.state),
    "Needs a look": (run) => ["failed", "diverged", "interrupted"].includes(run.state),
  };
  const figure = (value) => (value === null || value === undefined ? -Infinity : signalbox.numbers.number(value));
  // title, what it sorts by (null: not at all), class
  const COLUMNS = [
    ["State", (run) => run.state, ""],
    ["Name", (run) => title(run).toLowerCase(), ""],
    ["Model, data, profile", (run) => `${run.model} ${run.data}`.toLowerCase(), ""],
    ["Steps", (run) => figure(run.step), "sb-right"],
    ["Loss, best held-out", (run) => figure(run.loss), "sb-right"],
    ["Peak memory", (run) => figure(run.peak_gib), "sb-right"],
    ["When, how long", (run) => figure(run.began), "sb-right"],
    ["Disk", (run) => figure(run.bytes), "sb-right"],
    ["", null, "sb-right"],
  ];
  const title = (run) => run.name || run.run_id;
  const base = (run) => `api/runs/${encodeURIComponent(run.run_id)}`;

  class RunsList {
    constructor(element) {
      this.root = element;
      this.runs = [];
      this.may = {};
      this.mark = "";
      this.group = "All";
      this.order = { by: 6, down: true };
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
      this.search = el("input.sb-input", { type: "search", placeholder: "Find by name, model, data …", "aria-label": "Find a run" });
      this.search.addEventListener("input", () => this.show());
      this.groups = Object.keys(GROUPS).map((name) => [name, button(name, () => this.choose(name), "", { class: "sb-button sb-runs-group" })]);
      this.said = el("p.sb-help", { role: "status" });
      this.heads = COLUMNS.map(([name, key, kind], at) => el(`th${kind ? `.${kind}` : ""}`, { scope: "col" },
        key ? el("button.sb-runs-sort", { type: "button", onclick: () => this.sort(at) }, name) : el("span.sb-hidden", "Actions")));
      this.body = el("tbody");
      this.table = el("table.sb-table.sb-runs-table", el("caption.sb-hidden", "Runs"), el("thead", el("tr", this.heads)), this.body);
      this.dialog = el("dialog.sb-runs-dialog", { "aria-labelledby": "sb-runs-title" });
      const head = el("div.sb-runs-head", el("h1.sb-title", "Runs"), el("div.sb-runs-tools", this.search, el("div.sb-runs-groups", { role: "group", "aria-label": "Which runs" }, this.groups.map(([, node]) => node))));
      this.root.replaceChildren(el("div.sb-runs", head, el("section.sb-panel.sb-runs-panel", this.table, this.said), this.dialog));
    }

    onAnswer(answer) {
      this.root.classList.remove("is-silent");
      this.mark = answer.h;
      if (answer.runs) {
        this.runs = answer.runs;
        this.may = answer.may;
        this.show();
      }
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
      this.order = { by: at, down: this.order.by === at ? !this.order.down : at > 2 };
      this.show();
    }

    /** The runs that fit the group and every word searched for, in order. */
    get chosen() {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const text = (run) => [run.run_id, run.name, run.why, run.model, run.data, run.profile, run.state, run.method].join(" ").toLowerCase();
      const key = COLUMNS[this.order.by][1], sign = this.order.down ? -1 : 1;
      const compare = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * sign;
      return this.runs.filter((run) => GROUPS[this.group](run) && words.every((word) => text(run).includes(word))).sort(compare);
    }

    show() {
      const runs = this.chosen, focused = document.activeElement?.dataset?.key;
      for (const [name, node] of this.groups) {
        say(node, `${name} ${this.runs.filter(GROUPS[name]).length}`);
        node.setAttribute("aria-pressed", String(name === this.group));
      }
      this.heads.forEach((head, at) => head.setAttribute("aria-sort", at !== this.order.by ? "none" : this.order.down ? "descending" : "ascending"));
      this.body.replaceChildren(...runs.map((run) => this.row(run)));
      this.table.hidden = !runs.length;
      if (focused) this.body.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
      if (!this.runs.length) this.said.replaceChildren("No runs yet. ", el("a", { href: "./" }, "Start one on Train"), ".");
      else say(this.said, runs.length ? "" : "No run fits. Clear the search, or choose All.");
    }

    row(run) {
      const n = signalbox.numbers, open = `live?run=${encodeURIComponent(run.run_id)}`;
      const method = { lora: `LoRA r${run.rank}`, qlora: `QLoRA r${run.rank}`, full: "full" }[run.method];
      const of = run.total && run.total !== run.step ? ` / ${n.count(run.total)}` : "";
      const cells = [
        [chip(run.state)],
        [el("a", { href: open, data: { key: `open ${run.run_id}` } }, title(run)), run.why && el("p.sb-help", run.why), run.cause && el("p.sb-help", run.cause)],
        [run.model || "–", el("p.sb-help", [(run.data ?? []).join(", "), run.profile ?? "no profile", method].filter(Boolean).join(" · "))],
        [`${n.count(run.step)}${of}`],
        [n.loss(run.loss), el("p.sb-help", `best ${n.loss(run.best)}`)],
        [n.memory(run.peak_gib === "nan" ? null : run.peak_gib)],
        [el("time", { title: new Date((run.began ?? 0) * 1000).toISOString() }, n.when(run.began, Date.now() / 1000)), el("p.sb-help", n.duration(run.seconds))],
        [n.disk(run.bytes)],
        [this.actions(run)],
      ];
      return el("tr", cells.map((content, at) => el(`td${COLUMNS[at][2] ? `.${COLUMNS[at][2]}` : ""}`, { data: { title: COLUMNS[at][0] } }, content.filter(Boolean))));
    }

    actions(run) {
      const small = (word, act, key) => button(word, act, "", { class: "sb-button sb-small", data: { key: `${key} ${run.run_id}` } });
      const isLive = ["preparing", "running", "pausing", "stopping"].includes(run.state);
      return el("span.sb-runs-actions",
        this.may.resume && run.allowed.includes("resume") && run.saved_step !== null && small("Resume", () => this.resume(run), "resume"),
        this.may.note && run.to_type && small("Name …", () => this.rename(run), "name"),
        this.may.delete && run.to_type && !isLive && small("Delete …", () => this.confirm(run), "delete"));
    }

    async resume(run) {
      try {
        await send(`${base(run)}/command`, { command: "resume" });
        location.href = `live?run=${encodeURIComponent(run.run_id)}`;
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
      const typed = el("input.sb-input", { type: "text", autocomplete: "off", spellcheck: "false", "aria-label": "The run's name" });
      const text = [
        el("p", `Deletes its curve, its log and every checkpoint: ${signalbox.numbers.disk(run.bytes)}. This cannot be undone.`),
        el("p", "Type the name to confirm:"), el("p", el("code", run.to_type)), typed,
      ];
      this.ask(`Delete ${title(run)}?`, text, [["Delete", "danger", () => send(`${base(run)}/delete`, { name: typed.value })]]);
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
      const buttons = actions.map(([word, kind, act]) => button(word, async (event) => {
        event.target.disabled = true;
        try {
          await act();
          close();
          this.poller.soon();
        } catch (error) {
          refusal.textContent = error.message;
          event.target.disabled = false;
        }
      }, kind));
      this.dialog.replaceChildren(el("h2", { id: "sb-runs-title" }, heading), ...content, refusal, el("div.sb-runs-buttons", button(actions.length ? "Cancel" : "Close", close), buttons));
      this.dialog.showModal();
    }
  }

  signalbox.runs = (element) => new RunsList(element);
})();
