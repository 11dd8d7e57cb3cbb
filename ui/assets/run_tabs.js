// What stands in the tabs under the board, each from one answer of the server: lists of elements, text only.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button } = signalbox;
  const SHOWN = 400; // characters of a row before it is opened

  /** Text that may be long: the beginning, and the rest on demand. */
  function folded(text) {
    if (text.length <= SHOWN) return el("pre.sb-live-text", text);
    return el("details.sb-live-folded", el("summary", el("pre.sb-live-text", `${text.slice(0, SHOWN)} …`)), el("pre.sb-live-text", text));
  }

  function table(heads, rows) {
    return el("div.sb-live-scroll", el("table.sb-table", el("thead", el("tr", heads.map((h) => el("th", { scope: "col" }, h)))), el("tbody", rows.map((r) => el("tr", r.map((cell) => el("td", cell ?? "–")))))));
  }

  function samples(events) {
    const n = signalbox.numbers;
    if (!events.length) return [el("p.sb-help", "No samples. Set Sample every in the settings to see answers while the model learns.")];
    const steps = [...new Set(events.map((e) => e.step))].reverse();
    return steps.map((step, i) => el("details.sb-live-sample", { open: i === 0 }, el("summary", `Step ${n.count(step)}`),
      events.filter((e) => e.step === step).map((e) => el("div.sb-live-pair",
        el("div", el("h3", "Prompt"), folded(e.prompt ?? "")),
        el("div", el("h3", "Answer"), folded(e.text ?? "")),
        typeof e.base === "string" && el("div", el("h3", "Before training"), folded(e.base))))));
  }

  function rows({ step, rows: found, note }, base) {
    const n = signalbox.numbers;
    if (!found.length) return [el("p.sb-help", note ?? `Nothing is known of the rows of step ${n.count(step)}.`)];
    // NaN first: it is what one looks for
    const height = (row) => (row.loss === "nan" ? Infinity : signalbox.number(row.loss));
    const ordered = found.toSorted((a, b) => height(b) - height(a));
    const cells = ordered.map((row) => [n.count(row.row), n.loss(row.loss), n.count(row.labels), row.where, row.where ? rowText(row.row, base) : null]);
    return [
      el("p.sb-help", `${found.length} rows of step ${n.count(step)}, highest loss first.${note ? ` ${note}` : ""}`),
      table(["Row", "Loss", "Labels", "Where", "Text"], cells),
    ];
  }

  /** A button that fetches the text of a row, turn by turn. */
  function rowText(row, base) {
    const place = el("div.sb-live-turns");
    const show = async () => {
      try {
        const { messages } = await signalbox.send(`${base}/row?row=${row}`);
        place.replaceChildren(...messages.map((m) => el("div", el("span.sb-help", m.role), folded(m.content))));
      } catch (error) {
        place.replaceChildren(el("span.sb-tone-bad", error.message));
      }
    };
    place.append(button("Show", show, "", { class: "sb-button sb-small" }));
    return place;
  }

  const shown = (value) => {
    if (value === null || value === "") return "–";
    if (typeof value === "boolean") return value ? "on" : "off";
    if (Array.isArray(value)) return value.length ? value.map((v) => (typeof v === "object" ? JSON.stringify(v) : String(v))).join("\n") : "–";
    return String(value);
  };

  function settings({ groups, facts, versions }) {
    const block = (title, entries) => el("section.sb-live-settings", el("h3", title), el("dl", entries.flatMap(([name, value, changed]) => [el("dt", name), el(changed ? "dd.is-changed" : "dd", value)])));
    return [
      el("p.sb-help", "What this run was started with. Bold: not the default."),
      el("div.sb-live-columns",
        Object.entries(groups).map(([title, fields]) => block(title, fields.map((f) => [f.title, `${shown(f.value)}${f.unit && f.value !== null ? ` ${f.value === 1 ? f.unit.replace(/s$/, "") : f.unit}` : ""}`, f.changed]))),
        block("Versions", Object.entries(versions)),
        block("Run", Object.entries(facts).map(([name, value]) => [name.replaceAll("_", " "), shown(value)]))),
    ];
  }

  function snippet(row, kind) {
    const text = kind === "full"
      ? ["from transformers import AutoModelForCausalLM, AutoTokenizer", `path = ${JSON.stringify(`${row.path}/model`)}`, "model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)"]
      : ["from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer", `path = ${JSON.stringify(`${row.path}/model`)}`, "model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)"];
    const id = `sb-use-${row.step}`;
    return el("details.sb-live-use", el("summary", "Use this model"), el("pre", { id }, text.join("\n")), el("button.sb-button", { type: "button", data: { copy: id } }, "Copy"));
  }

  function checkpoints({ checkpoints: found, method, may_verify: mayVerify }, base) {
    const n = signalbox.numbers;
    if (!found.length) return [el("p.sb-help", "No checkpoint yet. Save checkpoint writes one after the step under way.")];
    const cells = found.map((row) => {
      if (!row.whole) return [row.folder, null, null, "incomplete; passed over, kept", null, null];
      const verdict = el("span", "");
      const check = mayVerify && button("Verify", async () => {
        verdict.textContent = "reading …";
        try {
          const { problems } = await signalbox.send(`${base}/verify`, { step: row.step });
          verdict.textContent = problems.length ? `damaged: ${problems.join("; ")}` : "verified, every byte";
        } catch (error) {
          verdict.textContent = error.message;
        }
      }, "", { class: "sb-button sb-small" });
      return [`step ${n.count(row.step)}`, n.disk(row.bytes), n.when(row.written, Date.now() / 1000), row.names.join(", "), el("span", check || "", " ", verdict), row.path ? snippet(row, method) : null];
    });
    return [table(["Checkpoint", "Size", "Written", "Which", "Check", "Use"], cells)];
  }

  signalbox.runTabs = { Samples: samples, Rows: rows, Settings: settings, Checkpoints: checkpoints };
})();
