// A list of things with a report on each: what the Data page and the Models page share. Every word that comes from
// the server goes through textContent.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const BUSY_MS = 700;
  const CALM_MS = 5000;

  /** A labelled control: `field("Model", select)`. */
  function field(label, control) {
    const { el } = signalbox;
    control.id ||= `sb-${label.toLowerCase().replace(/\W+/g, "-")}`;
    return el("label.sb-field", { for: control.id }, el("span", label), control);
  }

  /** A sentence under a sign, in the tone of its state. */
  function note(sign, ...words) {
    const { el, glyph, tone } = signalbox;
    return el(`div.sb-note.sb-tone-${tone(sign)}`, glyph(sign), el("div", ...words));
  }

  class Shelf {
    /**
     * `kind` names the addresses (`api/KIND`); `columns` are the headings after the name, "#" in front for figures; `empty()` and `more(item)`
     * give nodes: what stands there without items, and what comes below a report. `onItems(items)` hears of each list.
     * `acts(answer)` gives what can be done about a finished report, at its end.
     */
    constructor(root, { kind, columns, empty, more, acts = () => [], onItems = () => {} }) {
      const { el } = signalbox;
      Object.assign(this, { root, kind, empty, more, acts, onItems });
      this.items = [];
      this.rows = new Map();
      this.chosen = decodeURIComponent(location.hash.slice(1));
      this.body = el("tbody");
      this.isFigure = columns.map((text) => text.startsWith("#"));
      const heads = ["Name", ...columns, "State"].map((text) =>
        el(text.startsWith("#") ? "th.sb-right" : "th", { scope: "col" }, text.replace("#", "")));
      this.table = el("table.sb-table.sb-shelf-table", el("thead", el("tr", heads)), this.body);
      this.list = el("section.sb-panel.sb-shelf-list", { "aria-label": "List" }, this.table);
      this.report = el("section.sb-panel.sb-shelf-report", { "aria-label": "Report", "aria-live": "polite" });
      this.extra = el("section.sb-panel.sb-shelf-more");
      this.columns = el("div.sb-shelf-columns", this.list, el("div.sb-stack16", this.report, this.extra));
      root.append(this.columns);
      window.addEventListener("hashchange", () => this.choose(decodeURIComponent(location.hash.slice(1))));
      document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.soon());
      this.poll();
    }

    async poll() {
      clearTimeout(this.timer);
      if (!this.root.isConnected) return;
      if (document.visibilityState === "visible") {
        try {
          const { items } = await signalbox.send(`api/${this.kind}`);
          this.draw(items);
          this.onItems(items);
        } catch (error) {
          if (!this.items.length) this.list.replaceChildren(note("warning", error.message));
        }
      }
      const busy = this.items.some((item) => item.sign === "preparing");
      this.timer = setTimeout(() => this.poll(), busy ? BUSY_MS : CALM_MS);
    }

    /** Look at the list now. */
    soon() {
      return this.poll();
    }

    choose(id) {
      this.chosen = id;
      // with the path: Gradio's <base> makes a bare "#…" another page
      history.replaceState(null, "", `${location.pathname}${location.search}#${encodeURIComponent(id)}`);
      this.draw(this.items);
    }

    draw(items) {
      const { el } = signalbox;
      this.items = items;
      this.root.classList.toggle("sb-shelf-empty", !items.length);
      if (!items.length) {
        this.list.replaceChildren(this.empty());
        return;
      }
      if (!this.table.isConnected) this.list.replaceChildren(this.table);
      // what was chosen may not be listed yet (just uploaded) or no longer: the wish stays, the first one is shown
      this.current = items.find((item) => item.id === this.chosen) ?? items[0];
      const rows = new Map();
      for (const item of items) {
        const mark = JSON.stringify([item, item === this.current]);
        const before = this.rows.get(item.id);
        rows.set(item.id, before?.mark === mark ? before : { mark, node: this.row(item, before) });
      }
      this.rows = rows;
      const nodes = [...rows.values()].map((row) => row.node);
      if (nodes.length !== this.body.children.length || nodes.some((node, at) => this.body.children[at] !== node))
        this.body.replaceChildren(...nodes);
      this.show(this.current);
    }

    row(item, before) {
      const { el, chip } = signalbox;
      const current = item === this.current;
      const name = el("button.sb-link", { type: "button", onclick: () => this.choose(item.id) }, item.name);
      name.setAttribute("aria-pressed", String(current));
      const cells = item.cells.map((text, at) => el(this.isFigure[at] ? "td.sb-right" : "td", text));
      const node = el(`tr${current ? ".sb-current" : ""}`, el("td", name), cells, el("td", chip(item.sign, item.word)));
      if (before?.node.contains(document.activeElement)) requestAnimationFrame(() => name.focus());
      return node;
    }

    /** Fetch and draw the report when the item or its state is another one than what is shown. */
    async show(item) {
      const mark = JSON.stringify([item.id, item.word, item.job]);
      if (mark === this.shown) return;
      this.shown = mark;
      let answer;
      try {
        answer = await signalbox.send(`api/${this.kind}/${encodeURIComponent(item.id)}`);
      } catch (error) {
        this.shown = "";
        this.report.replaceChildren(note("warning", error.message));
        return;
      }
      if (mark !== this.shown) return; // another one was chosen meanwhile
      this.report.replaceChildren(...this.reportOf(answer));
      if (this.about !== item.id) this.extra.replaceChildren(...[this.more?.(answer)].flat().filter(Boolean));
      this.extra.hidden = !this.extra.children.length;
      this.about = item.id;
    }

    reportOf(answer) {
      const { el, chip } = signalbox;
      const top = [el("h2", answer.name), el("div.sb-help.sb-mono.sb-path", answer.path)];
      if (answer.state === "running") {
        const bar = el("div.sb-bar", { role: "progressbar", "aria-label": "Check" }, el("i"));
        bar.firstChild.style.width = `${Math.round((answer.progress ?? 0) * 100)}%`;
        const first = answer.view ? [facts(answer.view.facts), groups(answer.view.groups)].filter(Boolean) : [];
        return [...top, chip("preparing", answer.word), bar, ...first, el("div.sb-row", this.action("Stop the check", "cancel"))];
      }
      const again = this.action(answer.state === "not-run" ? "Check" : "Check again", "check");
      if (answer.state === "not-run") return [...top, el("p", "Not checked yet, or changed since."), el("div.sb-row", again)];
      if (answer.state === "failed") return [...top, note("problem", answer.error), el("div.sb-row", again)];
      const view = answer.view;
      return [...top, note(view.status, view.headline), facts(view.facts), bars(view.bars), groups(view.groups), ...this.acts(answer), el("div.sb-row", again)].filter(Boolean);
    }

    /** A button that asks something of the chosen item; a refusal stands beside it. */
    action(text, what, options = {}, kind = "") {
      const { el, button, say } = signalbox;
      const said = el("span.sb-message", { role: "status" });
      const ask = async () => {
        control.disabled = true;
        try {
          await signalbox.send(`api/${this.kind}/${encodeURIComponent(this.current.id)}/${what}`, options);
          say(said, "");
          this.shown = "";
          await this.soon();
        } catch (error) {
          say(said, error.message);
        }
        control.disabled = false;
      };
      const control = button(text, ask, kind);
      return el("span.sb-row", control, said);
    }
  }

  function facts(pairs) {
    const { el } = signalbox;
    return pairs.length ? el("dl.sb-facts", pairs.map(([name, text]) => [el("dt", name), el("dd", text)]).flat()) : null;
  }

  function groups(found) {
    const { el, glyph, tone } = signalbox;
    if (!found.length) return null;
    const entry = (group) => {
      const sign = glyph(group.status);
      sign.classList.add(`sb-tone-${tone(group.status)}`);
      const excerpt = (at) => (group.excerpts?.[at] ? el("code.sb-excerpt", group.excerpts[at]) : null);
      const lines = group.lines.map((line, at) => el("li", line, excerpt(at)));
      if (group.more) lines.push(el("li.sb-help", `and ${signalbox.numbers.count(group.more)} more`));
      const shown = lines.length ? el("details", { open: found.length === 1 }, el("summary", "Show the lines"), el("ul.sb-lines", lines)) : null;
      return el("li", sign, el("span", group.title), group.fix ? el("span.sb-help", group.fix) : null, shown);
    };
    return el("ul.sb-checks", found.map(entry));
  }

  /** Rows by length in tokens; bars over the limit in the tone of a warning. */
  function bars(data) {
    const { el, numbers } = signalbox;
    if (!data) return null;
    const most = Math.max(...data.counts, 1);
    const columns = data.counts.map((count, at) => {
      const over = data.limit && data.edges[at] >= data.limit;
      const from = numbers.count(data.edges[at]), to = numbers.count(data.edges[at + 1]);
      const bar = el(`i${over ? ".sb-over" : ""}`, { title: `${numbers.count(count)} rows of ${from} to ${to} tokens` });
      bar.style.height = count ? `${Math.max((count / most) * 100, 2)}%` : "0";
      return bar;
    });
    const last = numbers.count(data.edges[data.edges.length - 1]);
    return el("figure.sb-histogram",
      el("div", { role: "img", "aria-label": `Rows by length, up to ${last} tokens` }, columns),
      el("figcaption.sb-help", el("span", "0"), el("span", "rows by length in tokens"), el("span", last)));
  }

  Object.assign(signalbox, { Shelf, field, note });
})();
