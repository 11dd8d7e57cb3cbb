// What can be done about a dataset on the Data page: the repaired copy, the column mapping with its preview, deletion.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const JOB_MS = 500;
  const TYPING_MS = 200;
  const KINDS = [["talk", "question and answer"], ["messages", "a list of turns"], ["text", "plain text"]];
  const PARTS = { talk: ["user", "input", "system", "assistant"], messages: ["messages"], text: ["text"] };
  const NAMES = { user: "Question (user)", input: "Added to it (input)", system: "System message", assistant: "Answer (assistant)", messages: "Turns", text: "Text" };

  const address = (item, what) => `api/data/${encodeURIComponent(item.id)}/${what}`;

  /** At the end of a report: the repaired copy where one would help, and the columns. */
  signalbox.dataActs = (answer, shelf) => {
    const { view } = answer;
    return [view.repairable ? repair(answer, shelf) : null, view.columns.length ? mapping(answer, shelf) : null];
  };

  function repair(answer, shelf) {
    const { el, button, say, send, numbers } = signalbox;
    const said = el("span.sb-message", { role: "status" });
    const start = button("Use the repaired copy", async () => {
      start.disabled = true;
      try {
        const { job } = await send(address(answer, "repair"), {});
        const made = await finished(job, (done, total) => say(said, total ? `Repairing, ${numbers.percent(done, total)}` : "Repairing"));
        say(said, made.summary);
        await shelf.soon();
        shelf.choose(made.id);
      } catch (error) {
        say(said, error.message);
      }
      start.disabled = false;
    }, "primary");
    return el("div.sb-stack",
      el("div.sb-row", start, said),
      el("p.sb-help", "A new version: rows without problems, unanswered last turns taken off, rows said twice once. No text is added; what is left out can be downloaded. This file stays as it is."));
  }

  /** The result of a job once it has ended; throws its error. */
  async function finished(job, onProgress) {
    for (;;) {
      const found = await signalbox.send(`api/data-jobs/${encodeURIComponent(job)}`);
      if (found.state === "done") return found.result;
      if (found.state !== "running") throw new Error(found.error ?? "The repair did not come to its end.");
      onProgress(...(found.progress ?? [0, 0]));
      await new Promise((resolve) => setTimeout(resolve, JOB_MS));
    }
  }

  /** Which column is what: selects, three rows as they would be read, and a button that keeps it with the data. */
  function mapping(answer, shelf) {
    const { el, button, field, say, send } = signalbox;
    const { view } = answer;
    const given = Object.fromEntries((view.mapping.length ? view.mapping : view.suggested).map((text) => [text.slice(0, text.indexOf("=")), text.slice(text.indexOf("=") + 1)]));
    const kind = el("select.sb-input", { onchange: () => change() }, KINDS.map(([value, text]) => el("option", { value }, text)));
    kind.value = "messages" in given ? "messages" : "text" in given ? "text" : "talk";
    const selects = Object.fromEntries(Object.keys(NAMES).map((part) => {
      const options = [el("option", { value: "" }, "none"), ...view.columns.map((name) => el("option", { value: name, selected: given[part] === name }, name))];
      return [part, el("select.sb-input", { id: `sb-map-${part}`, onchange: () => change() }, options)];
    }));
    const groups = Object.fromEntries(Object.entries(PARTS).map(([name, parts]) => [name, el("div.sb-fields", parts.map((part) => field(NAMES[part], selects[part])))]));
    const preview = el("div.sb-preview", { "aria-live": "polite" });
    const said = el("span.sb-message", { role: "status" });
    const keep = button("Use these columns", () => save(chosen()), "primary");
    const drop = view.mapping.length ? button("Read the file as it is", () => save([])) : null;
    const chosen = () => PARTS[kind.value].filter((part) => selects[part].value).map((part) => `${part}=${selects[part].value}`);
    let timer = 0, asked = 0;

    async function save(columns) {
      try {
        await send(address(answer, "columns"), { columns });
        say(said, "");
        shelf.shown = shelf.about = "";
        await shelf.soon();
      } catch (error) {
        say(said, error.message);
      }
    }

    async function show() {
      const mine = ++asked;
      try {
        const { rows, said: refused } = await send(address(answer, "preview"), { columns: chosen() });
        if (mine !== asked) return;
        say(said, refused ?? "");
        keep.disabled = Boolean(refused);
        preview.replaceChildren(...rows.map(rowOf));
      } catch (error) {
        if (mine !== asked) return;
        keep.disabled = true;
        say(said, error.message);
        preview.replaceChildren();
      }
    }

    function change() {
      for (const [name, group] of Object.entries(groups)) group.hidden = name !== kind.value;
      clearTimeout(timer);
      timer = setTimeout(show, TYPING_MS);
    }

    function rowOf(row) {
      if (row.problem) return el("div.sb-preview-row", signalbox.note("problem", row.problem));
      return el("div.sb-preview-row", row.messages.map((turn) => el("div.sb-preview-turn", el("span.sb-help", turn.role), el("div.sb-preview-said", turn.content))));
    }

    const isOpen = view.suggested.length > 0 || view.mapping.length > 0;
    const node = el("details.sb-mapping", { open: isOpen, ontoggle: () => node.open && !preview.children.length && change() },
      el("summary", "Columns"),
      el("p.sb-help", view.suggested.length ? "The columns have names of their own; this is a suggestion. First three rows as they would be read:" : "For files whose columns have names of their own. First three rows as they would be read:"),
      el("div.sb-fields", field("Each row is", kind)), ...Object.values(groups), preview, el("div.sb-row", keep, drop, said));
    if (isOpen) change();
    return node;
  }

  /** Below the row: where the data comes from, what was made of it, who used it, and how it goes. */
  signalbox.dataAbout = (item, shelf) => {
    const { el, button, send, say } = signalbox;
    const box = el("div.sb-stack");
    const said = el("span.sb-message", { role: "status" });
    const train = button("Train on this data", async () => {
      try {
        await send("api/train/fields", { values: { "data.dataset_path": item.path } });
        location.assign("./");
      } catch (error) {
        say(said, error.message);
      }
    });
    send(address(item, "about")).then((about) => {
      const facts = [];
      const link = (to) => el("a", { href: `#${encodeURIComponent(to.id)}`, onclick: (event) => (event.preventDefault(), shelf.choose(to.id)) }, to.name);
      if (about.parent) facts.push(el("p", "Made from ", link(about.parent), `. ${about.summary}`));
      if (about.examples.length) facts.push(el("ul.sb-lines", about.examples.map((line) => el("li", line))));
      if (about.rejects) facts.push(el("p", el("a", { href: address(item, "rejects"), download: "" }, "Download the rows left out, with reasons")));
      if (about.versions.length) facts.push(el("p", "Repaired: ", about.versions.map((to, at) => [at ? ", " : "", link(to)]).flat()));
      facts.push(el("p.sb-help", used(about)));
      box.replaceChildren(...facts, el("div.sb-row", train, said), ...(about.may_delete ? [deletion(item, about, shelf)] : []));
    }, (error) => box.replaceChildren(el("p.sb-help", error.message)));
    return [el("h3", "This data"), box];
  };

  function used({ runs, run_names: names }) {
    if (!runs) return "No run has used it.";
    const more = runs > names.length ? ` and ${runs - names.length} more` : "";
    return `Used by ${signalbox.numbers.count(runs)} ${runs === 1 ? "run" : "runs"}: ${names.join(", ")}${more}.`;
  }

  function deletion(item, about, shelf) {
    const { el, button, field, say, send } = signalbox;
    const said = el("span.sb-message", { role: "status" });
    const name = el("input.sb-input", { type: "text", id: "sb-delete-name", autocomplete: "off" });
    const go = button("Delete for good", async () => {
      try {
        await send(address(item, "delete"), { name: name.value });
        shelf.choose("");
        await shelf.soon();
      } catch (error) {
        say(said, error.message);
      }
    }, "danger");
    const cost = about.runs ? `${used(about)} They keep their checkpoints, and cannot be resumed without it.` : "No run has used it.";
    return el("details.sb-mapping", el("summary", "Delete this data…"), el("p", cost),
      el("div.sb-row.sb-end", field(`Type ${about.name}`, name), go, said));
  }
})();
