// The Data page: upload with progress, the shelf of datasets, and one row as a model sees it.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});

  signalbox.dataPage = (element, props) => {
    const { el, Shelf } = signalbox;
    const root = element.querySelector(".sb-shelf");
    const choices = signalbox.send("api/data-choices");
    const places = props.roots.length ? ` Also listed: what lies in ${props.roots.join(", ")}.` : "";
    root.append(
      el("div", el("h1.sb-title", "Data"),
        el("p.sb-help", `Conversations or texts to learn from: JSON Lines, JSON, CSV or Parquet, of messages, ShareGPT, Alpaca or question and answer; or prose in a .txt file.${places}`)));
    const shelf = new Shelf(root, {
      kind: "data",
      columns: ["#Rows", "#Size"],
      empty: () => el("div.sb-stack",
        el("p", "No data yet. Add a file above, or take the sample data that comes with the ", el("a", { href: "models" }, "starter model"), "."),
        el("p.sb-help", "Each line of the file is one conversation:"),
        el("code.sb-example", '{"messages": [{"role": "user", "content": "What is 2 plus 2?"}, {"role": "assistant", "content": "4."}]}')),
      acts: (answer) => signalbox.dataActs(answer, shelf),
      more: (item) => [...rowView(item, choices), ...signalbox.dataAbout(item, shelf)],
    });
    root.firstChild.after(upload(props.limits, shelf));
  };

  /** The form for a file: says the limit first, shows how far it is, can be stopped. */
  function upload(limits, shelf) {
    const { el, button, say, numbers } = signalbox;
    const hint = `or drop it here. Up to ${limits.text}: ${limits.said}. It stays on this machine and is checked at once.`;
    const said = el("span.sb-help.sb-upload-said", { role: "status" }, hint);
    const bar = el("div.sb-bar", { role: "progressbar", "aria-label": "Upload" }, el("i"));
    const input = el("input.sb-hidden", { type: "file", id: "sb-upload", accept: limits.suffixes.join(","), onchange: () => send(input.files[0]) });
    const choose = button("Add a file…", () => input.click(), "primary");
    let going = null;
    const stop = button("Stop", () => going?.abort());
    const idle = () => {
      bar.classList.add("sb-idle");
      stop.hidden = true;
      choose.disabled = false;
      input.value = "";
      going = null;
    };
    const refuse = (text) => {
      said.className = "sb-upload-said sb-tone-bad";
      say(said, text);
      idle();
    };

    function send(file) {
      if (!file || going) return;
      if (file.size > limits.bytes) {
        refuse(`${file.name} is ${numbers.disk(file.size)}; the limit is ${limits.text}. Put it into a folder and start Signalbox with --data-root and that folder.`);
        return;
      }
      const request = (going = new XMLHttpRequest());
      said.className = "sb-upload-said";
      bar.classList.remove("sb-idle");
      stop.hidden = false;
      choose.disabled = true;
      request.upload.onprogress = (event) => {
        bar.firstChild.style.width = `${(event.loaded / file.size) * 100}%`;
        bar.setAttribute("aria-valuenow", Math.round((event.loaded / file.size) * 100));
        say(said, event.loaded < file.size ? `${file.name}: ${numbers.disk(event.loaded)} of ${numbers.disk(file.size)}` : `${file.name}: storing`);
      };
      request.onload = () => {
        let answer = {};
        try {
          answer = JSON.parse(request.responseText);
        } catch {
          // a reply that is not ours has no sentence to show
        }
        if (request.status !== 201) return refuse(answer.error ?? `The server answered ${request.status}. Nothing was stored.`);
        say(said, `Added ${answer.name}.`);
        idle();
        shelf.choose(answer.id);
        shelf.soon();
      };
      request.onerror = () => refuse("The upload broke off. Nothing was stored. Try again.");
      request.onabort = () => refuse(`Stopped. Nothing of ${file.name} was stored.`);
      request.open("POST", `api/data/upload?name=${encodeURIComponent(file.name)}`);
      request.send(file);
    }

    idle();
    const zone = el("section.sb-panel.sb-upload", { "aria-label": "Add data" },
      el("div.sb-row", choose, input, said, stop), bar);
    zone.addEventListener("dragover", (event) => event.preventDefault());
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      send(event.dataTransfer.files[0]);
    });
    return zone;
  }

  /** One row of a dataset as tokens of a chosen model under a chosen profile. */
  function rowView(item, choices) {
    const { el, button, field, say, send, numbers } = signalbox;
    const kept = (signalbox.rowChoice ??= { model: "", profile: "plain", mode: "tokens" });
    const modes = [["tokens", "Tokens"], ["text", "Text"]].map(([mode, text]) => {
      const node = button(text, () => {
        kept.mode = mode;
        for (const other of modes) other.setAttribute("aria-pressed", String(other === node));
        if (last) body.replaceChildren(...rowBody(last, kept.mode));
      }, "", { "aria-pressed": String(kept.mode === mode) });
      return node;
    });
    let last = null;
    const model = el("select.sb-input", { onchange: () => ((kept.model = model.value), show()) });
    const profile = el("select.sb-input", { onchange: () => ((kept.profile = profile.value), show()) });
    const number = el("input.sb-input.sb-row-number", { type: "text", inputmode: "numeric", value: "1", onchange: () => show() });
    const of = el("span.sb-help");
    const body = el("div.sb-stack");
    const heldOut = el("select.sb-input", el("option", { value: "" }, "none"));
    const measure = button("Measure lengths with this model", () => check());
    const exactly = button("Count every row", () => check(true), "", { title: "Makes the tokens of every row, as training would; later runs with these settings find them made." });
    const said = el("span.sb-message", { role: "status" });
    const back = button("‹", () => show(-1), "", { "aria-label": "Row before" });
    const next = button("›", () => show(1), "", { "aria-label": "Row after" });
    let asked = 0;

    async function check(exact = false) {
      try {
        const options = { model: model.value, profile: profile.value, held_out: heldOut.value, exact };
        await send(`api/data/${encodeURIComponent(item.id)}/check`, options);
        say(said, "Checking; the report above follows.");
      } catch (error) {
        say(said, error.message);
      }
    }

    async function show(step = 0) {
      const mine = ++asked;
      number.value = String(Math.max(1, (parseInt(number.value.replace(/\D/g, ""), 10) || 1) + step));
      if (!model.value) {
        body.replaceChildren(el("p.sb-help", "There is no model yet to show tokens with. ", el("a", { href: "models" }, "Models")));
        measure.disabled = exactly.disabled = true;
        return;
      }
      const query = new URLSearchParams({ row: number.value, model: model.value, profile: profile.value });
      try {
        const answer = await send(`api/data/${encodeURIComponent(item.id)}/row?${query}`);
        if (mine !== asked) return;
        say(of, answer.rows ? `of ${numbers.count(answer.rows)}, line ${numbers.count(answer.line)}` : "");
        last = answer;
        back.disabled = !answer.rows || answer.row <= 1;
        next.disabled = !answer.rows || answer.row >= answer.rows;
        body.replaceChildren(...rowBody(answer, kept.mode));
      } catch (error) {
        if (mine === asked) body.replaceChildren(signalbox.note("problem", error.message));
      }
    }

    choices.then(({ models, profiles, datasets }) => {
      model.append(...models.map((name) => el("option", { value: name, selected: name === kept.model }, name)));
      profile.append(el("option", { value: "", selected: kept.profile === "" }, "none (plain text)"), ...profiles.map((name) => el("option", { value: name, selected: name === kept.profile }, name)));
      heldOut.append(...datasets.filter((other) => other.id !== item.id).map((other) => el("option", { value: other.id }, other.name)));
      show();
    });
    const steps = el("span.sb-row.sb-steps", back, next, of);
    return [
      el("h3", "What the model will see"),
      el("div.sb-row.sb-end", field("Model", model), field("Profile", profile), field("Row", number), steps, el("span.sb-row.sb-modes", { role: "group", "aria-label": "Show the row as" }, modes)),
      body,
      el("h3", "Measure and compare"),
      el("div.sb-row.sb-end", field("Held-out file to compare with", heldOut), measure, exactly, said),
    ];
  }

  /** The row's messages in the file, and as they are trained where the profile changes them. */
  function rowTexts(answer) {
    const { el } = signalbox;
    const column = (title, messages) => el("div.sb-preview", el("h4.sb-help", title), messages.map((turn) =>
      el("div.sb-preview-row.sb-preview-turn", el("span.sb-help", turn.role), el("div.sb-row-said", turn.content))));
    const isSame = JSON.stringify(answer.before) === JSON.stringify(answer.after);
    return isSame ? [column("The row; the profile changes nothing in it", answer.after)]
      : [column("In the file", answer.before), column("As it is trained", answer.after)];
  }

  function rowBody(answer, mode) {
    const { el, numbers } = signalbox;
    if (answer.problem) return [signalbox.note("problem", answer.problem)];
    if (mode === "text") return rowTexts(answer);
    const counts = answer.counts;
    const share = `${numbers.count(counts.tokens)} tokens, ${numbers.count(counts.label)} learned (${numbers.percent(counts.label, counts.tokens)})`;
    const tokens = answer.tokens.map(([text, kind]) => el(`span${kind === "context" ? "" : `.sb-tok-${kind}`}`, text));
    const key = el("p.sb-help", `${share}. `, el("span.sb-tok-label", "learned"), " · context · ", el("span.sb-tok-cut", "too long, cut"), " · ",
      el("span.sb-tok-special", "special"));
    return [answer.note ? el("p", answer.note) : null, el("div.sb-tokens", { tabindex: "0", "aria-label": "Tokens of the row" }, tokens), key].filter(Boolean);
  }
})();
