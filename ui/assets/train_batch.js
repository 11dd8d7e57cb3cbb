// "First batch" in "What the model will see": the collated tensors of the form's settings, document by document.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const ASK_MS = 500;
  const WORDS = { label: "label", context: "context", special: "context, special token" };

  signalbox.trainBatch = (fields) => {
    const { el, say, send, numbers } = signalbox;
    const by = (id) => document.getElementById(id);
    const batch = { isOpen: false, timer: 0, asked: 0, shown: null };

    /** Ask how the search stands and draw it; asks again while it goes on. */
    async function ask() {
      clearTimeout(batch.timer);
      const asked = ++batch.asked;
      let answer;
      try {
        answer = await send("api/train/batch");
      } catch (error) {
        answer = { state: "failed", text: error.message };
      }
      if (asked !== batch.asked || !batch.isOpen) return;
      if (answer.state === "none") return batch.isFinding ? undefined : void find();
      show(answer);
      if (answer.state === "running") batch.timer = setTimeout(ask, ASK_MS);
    }

    async function find() {
      clearTimeout(batch.timer);
      batch.asked += 1; // an answer that is on its way is of an older search
      batch.isFinding = true;
      by("batch-again").hidden = true;
      try {
        await fields.flush();
        await fields.post("api/train/find-batch", {});
        await ask();
      } catch (error) {
        show({ state: "failed", text: error.message });
      }
      batch.isFinding = false;
    }

    function show(answer) {
      const body = by("batch-body");
      const changed = answer.changed ?? [];
      const isOld = answer.state !== "done" || changed.length > 0;
      const again = by("batch-again");
      again.hidden = answer.state === "running" || !isOld;
      if (answer.state === "running") say(by("batch-said"), "Finding the first batch: tokens are made as a run makes them.");
      else if (answer.state === "failed") say(by("batch-said"), answer.text);
      else say(by("batch-said"), changed.length ? `Out of date: ${changed.join(", ")} changed.` : answer.batch.summary);
      by("batch-said").className = answer.state === "failed" ? "sb-message" : "sb-help";
      body.classList.toggle("sb-batch-old", isOld);
      if (answer.state === "failed") body.replaceChildren();
      if (answer.state !== "done") return;
      const text = JSON.stringify(answer.batch);
      if (text === batch.shown && body.childElementCount) return; // a fold that is open stays open
      batch.shown = text;
      body.replaceChildren(legend(), ...documents(answer.batch));
      for (const box of body.querySelectorAll(".sb-fold")) if (box.clientHeight && box.scrollHeight <= box.clientHeight) box.nextElementSibling.hidden = true;
    }

    function documents(found) {
      let place = 0;
      const parts = found.documents.map((document) => {
        const part = one(document, place, found.max_length);
        place += document.tokens;
        return part;
      });
      if (found.more) parts.push(el("p.sb-help", `${numbers.count(found.more)} more rows are in this batch.`));
      return parts;
    }

    function one(document, place, limit) {
      const { row, file, line, piece, tokens, labels, cut } = document;
      const last = place + tokens - 1;
      const where = `${file}, line ${numbers.count(line)}${piece ? `, piece ${numbers.count(piece)}` : ""}`;
      const figures = `${numbers.count(tokens)} tokens, ${numbers.count(labels)} labels`;
      const head = el("div.sb-document-head",
        el("h3.sb-document-name", where),
        el("span.sb-help", `row ${numbers.count(row)} · ${figures} · places ${numbers.count(place)}–${numbers.count(last)} of the batch`),
        cut ? el("span.sb-document-cut", `${numbers.count(cut)} cut`) : null);
      const pieces = document.shown.map(([text, kind, position, id]) =>
        el(`span.sb-tok${kind === "context" ? "" : `.sb-tok-${kind}`}`,
          { title: `position ${position}, place ${place + position} of the batch, id ${id}: ${WORDS[kind]}` }, text));
      const box = el("div.sb-tokens.sb-fold", { tabindex: "0", "aria-label": `Tokens of ${where}` },
        el("span.sb-position", { title: "positions start again here: no token sees the row before" }, "0"), ...pieces,
        document.shown.length < tokens ? el("span.sb-help", ` … ${numbers.count(tokens - document.shown.length)} more tokens are not shown`) : null,
        cut ? el("span.sb-tok-cut.sb-cut-here", { title: `${numbers.count(cut)} tokens of this row do not fit into ${numbers.count(limit)}` }, `${numbers.count(cut)} tokens cut`) : null);
      return el("section.sb-document", { "aria-label": where }, head, box, more(box));
    }

    function more(box) {
      const button = el("button.sb-link", { type: "button", "aria-expanded": "false" }, "Show all");
      button.addEventListener("click", () => {
        const isOpen = box.classList.toggle("sb-unfolded");
        button.setAttribute("aria-expanded", String(isOpen));
        say(button, isOpen ? "Show less" : "Show all");
      });
      return button;
    }

    function legend() {
      return el("p.sb-help.sb-legend",
        el("span.sb-position", "0"), " a row begins, positions start again · ",
        el("span.sb-tok-label", "label"), " is learned · context is read · ",
        el("span.sb-tok-special", "mark"), " is a special token · ",
        el("span.sb-tok-cut", "cut"), " did not fit");
    }

    by("batch-again").addEventListener("click", find);
    by("train-view").addEventListener("click", (event) => {
      const button = event.target.closest("button[data-pane]");
      if (!button) return;
      batch.isOpen = button.dataset.pane === "batch";
      for (const other of by("train-view").querySelectorAll("button[data-pane]")) other.setAttribute("aria-pressed", String(other === button));
      by("view-row-pane").hidden = batch.isOpen;
      by("view-batch").hidden = !batch.isOpen;
      if (batch.isOpen) ask();
    });
    // whether it has grown old is the server's to say; it is asked when the page's state comes in
    document.addEventListener("signalbox:train", () => batch.isOpen && !batch.isFinding && ask());
  };
})();
