// What stands in the tabs under the board, each from one answer of the server: lists of elements, text only.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button } = signalbox;
  const SHOWN = 400; // characters of a text before it is opened
  const LOADERS = {
    full: ["from transformers import AutoModelForCausalLM, AutoTokenizer", "AutoModelForCausalLM"],
    lora: ["from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer", "AutoPeftModelForCausalLM"],
  };

  const small = (word, act) => button(word, act, "", { class: "sb-button sb-small" });

  /** Text that may be long: the beginning, and the rest on demand. */
  function folded(text) {
    const whole = el("pre.sb-live-text", text);
    if (text.length <= SHOWN) return whole;
    const beginning = el("pre.sb-live-text", `${text.slice(0, SHOWN)} …`);
    return el("details.sb-live-folded", el("summary", beginning), whole);
  }

  function table(heads, rows) {
    const head = el("thead", el("tr", heads.map((text) => el("th", { scope: "col" }, text))));
    const body = el("tbody", rows.map((cells) => el("tr", cells.map((cell) => el("td", cell ?? "–")))));
    return el("div.sb-live-scroll", el("table.sb-table", head, body));
  }

  // ---- samples -------------------------------------------------------------------------------------------------

  function samples(events) {
    const none = "No samples. Set Sample every in the settings to see answers while the model learns.";
    if (!events.length) return [el("p.sb-help", none)];
    const steps = [...new Set(events.map((event) => event.step))].reverse();
    return steps.map((step, i) => {
      const pairs = events.filter((event) => event.step === step).map(pair);
      return el("details.sb-live-sample", { open: i === 0 }, el("summary", `Step ${signalbox.numbers.count(step)}`), pairs);
    });
  }

  function pair({ prompt = "", text = "", base }) {
    const part = (title, content) => el("div", el("h3", title), folded(content));
    const before = typeof base === "string" && part("Before training", base);
    return el("div.sb-live-pair", part("Prompt", prompt), part("Answer", text), before);
  }

  // ---- rows of a step ------------------------------------------------------------------------------------------

  function rows({ step, rows: found, note = "" }, base) {
    const n = signalbox.numbers;
    if (!found.length) return [el("p.sb-help", note || `Nothing is known of the rows of step ${n.count(step)}.`)];
    // NaN first: it is what one looks for
    const height = (row) => (row.loss === "nan" ? Infinity : signalbox.number(row.loss));
    const cells = found.toSorted((a, b) => height(b) - height(a)).map((row) => [
      n.count(row.row), n.loss(row.loss), n.count(row.labels), row.where, row.where && rowText(row.row, base),
    ]);
    const words = `${found.length} rows of step ${n.count(step)}, highest loss first. ${note}`;
    return [el("p.sb-help", words), table(["Row", "Loss", "Labels", "Where", "Text"], cells)];
  }

  /** A button that fetches the text of a row, turn by turn. */
  function rowText(row, base) {
    const place = el("div.sb-live-turns");
    const show = async () => {
      try {
        const { messages } = await signalbox.send(`${base}/row?row=${row}`);
        const turns = messages.map(({ role, content }) => el("div", el("span.sb-help", role), folded(content)));
        place.replaceChildren(...turns);
      } catch (error) {
        place.replaceChildren(el("span.sb-tone-bad", error.message));
      }
    };
    place.append(small("Show", show));
    return place;
  }

  // ---- settings ------------------------------------------------------------------------------------------------

  function shown(value) {
    if (value === null || value === "" || (Array.isArray(value) && !value.length)) return "–";
    if (typeof value === "boolean") return value ? "on" : "off";
    if (Array.isArray(value)) return value.map(shown).join("\n");
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  }

  function withUnit({ value, unit }) {
    if (!unit || value === null) return shown(value);
    return `${shown(value)} ${value === 1 ? unit.replace(/s$/, "") : unit}`;
  }

  function settings({ groups, facts, versions }) {
    const block = (title, entries) => {
      const line = ([name, value, changed]) => [el("dt", name), el(changed ? "dd.is-changed" : "dd", value)];
      return el("section.sb-live-settings", el("h3", title), el("dl", entries.flatMap(line)));
    };
    const ofGroup = ([title, fields]) => block(title, fields.map((field) => [field.title, withUnit(field), field.changed]));
    const about = Object.entries(facts).map(([name, value]) => [name.replaceAll("_", " "), shown(value)]);
    const blocks = [...Object.entries(groups).map(ofGroup), block("Versions", Object.entries(versions)), block("Run", about)];
    return [el("p.sb-help", "What this run was started with. Bold: not the default."), el("div.sb-live-columns", blocks)];
  }

  // ---- checkpoints ---------------------------------------------------------------------------------------------

  /** `again` fetches and draws the tab anew. */
  function checkpoints({ checkpoints: found, method, may, before }, base, again) {
    const n = signalbox.numbers;
    if (!found.length) return [el("p.sb-help", "No checkpoint yet. Save checkpoint writes one after the step under way.")];
    const cells = found.map((row) => {
      if (!row.whole) return [`step ${n.count(row.step)}`, null, null, "incomplete; passed over, kept", null, null];
      const written = n.when(row.written, Date.now() / 1000);
      const check = may.verify ? verifier(row.step, base) : null, use = row.path && snippet(row, method);
      return [`step ${n.count(row.step)}`, n.disk(row.bytes), written, which(row, may, before, base, again), check, use];
    });
    const help = "Current: the one you use. It is never pruned, and the run that holds it cannot be deleted.";
    return [el("p.sb-help", help), table(["Checkpoint", "Size", "Written", "Which", "Check", "Use"], cells)];
  }

  /** "best, last, current", with what makes another one current. */
  function which({ step, names }, may, before, base, again) {
    const refusal = el("span.sb-tone-bad", { role: "alert" });
    const act = (address, body) => async ({ target }) => {
      target.disabled = true;
      try {
        await signalbox.send(address, body);
        again();
      } catch (error) {
        refusal.textContent = ` ${error.message}`;
        target.disabled = false;
      }
    };
    const isCurrent = names.includes("current");
    const back = isCurrent && before && may.roll_back && small("Roll back", act("api/current/roll-back", {}));
    if (back) back.title = `The current model becomes step ${before.step} of ${before.name} again`;
    const promote = !isCurrent && may.promote && small("Make current", act(`${base}/promote`, { step }));
    return el("span", names.length ? `${names.join(", ")} ` : "", back, promote, refusal);
  }

  function verifier(step, base) {
    const verdict = el("span", { role: "status" });
    const check = async () => {
      verdict.textContent = " reading …";
      try {
        const { problems } = await signalbox.send(`${base}/verify`, { step });
        verdict.textContent = problems.length ? ` damaged: ${problems.join("; ")}` : " whole, every byte";
      } catch (error) {
        verdict.textContent = ` ${error.message}`;
      }
    };
    return el("span", small("Verify", check), verdict);
  }

  /** How to load the checkpoint in Python; the path is only sent to people who may see paths. */
  function snippet({ path, step }, method) {
    const [imports, loader] = LOADERS[method === "full" ? "full" : "lora"];
    const lines = [
      imports,
      `path = ${JSON.stringify(`${path}/model`)}`,
      `model = ${loader}.from_pretrained(path)`,
      "tokenizer = AutoTokenizer.from_pretrained(path)",
    ];
    const code = el("pre", { id: `sb-use-${step}` }, lines.join("\n"));
    const copy = el("button.sb-button.sb-small", { type: "button", data: { copy: code.id } }, "Copy");
    return el("details.sb-live-use", el("summary", "Use this model"), code, copy);
  }

  signalbox.runTabs = { Samples: samples, Rows: rows, Settings: settings, Checkpoints: checkpoints };
})();
