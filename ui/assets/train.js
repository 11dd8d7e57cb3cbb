// The Train page: asks api/train/state, puts the answer in place, and sends every button's act to the server.
// Markup in answers is made and escaped by ui/pages/train_html.py; what people typed goes in through textContent here.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const CALM_MS = 5000;
  const PENDING_MS = 700;
  const TYPING_MS = 150;
  const NOTING_MS = 400;
  const by = (id) => document.getElementById(id);
  const fieldOf = (key) => by(`f-${key.replaceAll(".", "-")}`);

  const PARTS = ["train-toolbar", "train-first", "gate", "train-view", "train-bottom", "f-hyperparams-method"];

  /** Gradio puts the parts of a page in place in no fixed order; begin when all of them are there. */
  signalbox.train = (...given) => (PARTS.every(by) ? begin(...given) : setTimeout(() => signalbox.train(...given), 20));

  function begin(element, trigger, watch, props) {
    const root = by("train");
    const page = { state: null, timer: 0, isAsking: false, again: false, failures: 0, texts: new Map(), sending: Promise.resolve() };

    // ---- state of the server ------------------------------------------------------------------------------------
    async function ask() {
      if (!element.isConnected) return;
      clearTimeout(page.timer);
      if (document.visibilityState !== "visible") return; // visibilitychange asks again
      if (page.isAsking) return void (page.again = true);
      page.isAsking = true;
      try {
        show(await signalbox.send("api/train/state"));
        page.failures = 0;
      } catch (error) {
        page.failures += 1;
        root.classList.remove("sb-waiting");
        if (page.failures > 1) message(`No answer from the server (${error.message}). Trying again.`);
      }
      page.isAsking = false;
      const wait = page.failures ? CALM_MS : page.state?.pending ? PENDING_MS : CALM_MS;
      page.timer = setTimeout(ask, page.again ? 0 : wait);
      page.again = false;
    }

    function show(state) {
      const before = page.state;
      page.state = state;
      if (page.failures > 1) message("");
      const first = state.empty && !page.wantsForm;
      by("train-first").hidden = !first;
      for (const id of ["train-columns", "train-bottom", "train-toolbar"]) by(id).hidden = first;
      showTry(state.try_it);
      showToolbar(state);
      showGate(state);
      showFields(state);
      const isOurs = state.form_revision === page.shownRevision || page.texts.size > 0 || page.isSending;
      if (before && before.form_revision !== state.form_revision && !isOurs) act({ act: "refresh" });
      root.classList.remove("sb-waiting");
      document.dispatchEvent(new CustomEvent("signalbox:train", { detail: state }));
    }

    // ---- toolbar and drawers ------------------------------------------------------------------------------------
    function showToolbar(state) {
      const select = by("train-config");
      const options = state.configs.map(([value, label]) => new Option(label, value, false, value === state.base));
      if (document.activeElement !== select) select.replaceChildren(...options);
      const count = state.changes;
      signalbox.say(by("train-changes"), count ? `${count} change${count > 1 ? "s" : ""}` : state.undone ? "changes dropped" : "no changes");
      by("train-revert").disabled = count === 0;
      const problem = by("train-base-problem");
      problem.hidden = !state.base_problem;
      signalbox.say(problem, state.base_problem);
      html(by("train-diff"), state.diff_html);
      html(by("train-backups"), state.backups_html);
    }

    const DRAWERS = { "train-diff": "train-changes", "train-suggestions": "train-suggest", "train-save": "train-save-as" };
    function drawer(id, isOpen) {
      for (const [name, button] of Object.entries(DRAWERS)) {
        const open = name === id && isOpen;
        by(name).hidden = !open;
        by(button).setAttribute("aria-expanded", String(open));
      }
    }

    async function suggest() {
      drawer("train-suggestions", by("train-suggestions").hidden);
      if (by("train-suggestions").hidden) return;
      by("train-suggestions").textContent = "…";
      by("train-suggestions").innerHTML = (await signalbox.send("api/train/suggest")).html;
    }

    async function save(event) {
      event.preventDefault();
      const said = by("train-save-message");
      try {
        const answer = await post("api/train/save", { name: by("train-save-name").value });
        said.className = "sb-help";
        said.textContent = answer.said;
      } catch (error) {
        said.className = "sb-message";
        said.textContent = error.message;
      }
      ask();
    }

    // ---- gate ---------------------------------------------------------------------------------------------------
    function showGate(state) {
      html(by("gate-head"), state.head_html);
      html(by("gate-lines"), state.lines_html);
      html(by("gate-fit"), state.fit_html);
      html(formFit(), state.fit_html);
      html(by("gate-plan"), state.plan_html);
      for (const id of ["train-start", "bottom-start"]) by(id).disabled = !state.can_start;
      signalbox.say(by("train-start"), state.start_label);
      for (const id of ["train-smoke", "bottom-smoke"]) by(id).disabled = !state.can_smoke;
      signalbox.say(by("train-smoke"), state.smoke_label);
      by("bottom-gate").innerHTML = state.head_html;
      for (const [id, text, hint] of [["train-name", state.name, state.auto_name], ["train-why", state.why, "optional"]]) {
        const input = by(id);
        if (document.activeElement !== input && !input.dataset.typing) input.value = text;
        input.placeholder = hint;
      }
    }

    function formFit() {
      if (!by("form-fit")) fieldOf("hyperparams.method").after(signalbox.el("div", { id: "form-fit" }));
      return by("form-fit");
    }

    /** Put markup in place only when it changed, keeping open folds open and the keyboard where it was. */
    function html(node, markup) {
      if (node.dataset.markup === markup) return;
      const open = new Set([...node.querySelectorAll("details[open]")].map((fold) => fold.dataset.fold));
      const focused = node.contains(document.activeElement) ? document.activeElement.textContent : null;
      node.innerHTML = markup;
      node.dataset.markup = markup;
      for (const fold of node.querySelectorAll("details")) fold.open = open.has(fold.dataset.fold);
      if (focused !== null) [...node.querySelectorAll("button, a, summary")].find((b) => b.textContent === focused)?.focus();
    }

    function message(text, isBad = true) {
      const node = by("gate-message");
      node.classList.toggle("sb-tone-rest", !isBad);
      signalbox.say(node, text);
    }

    async function go(address) {
      message("");
      await flush();
      for (const id of ["train-start", "bottom-start", "train-smoke", "bottom-smoke"]) by(id).disabled = true;
      try {
        const answer = await post(address, {});
        if (answer.go) return void location.assign(answer.go);
        message(answer.said ?? "", false);
      } catch (error) {
        message(error.message);
        by("gate").scrollIntoView({ block: "nearest" });
      }
      ask();
    }

    // ---- what is typed ------------------------------------------------------------------------------------------
    function typed(key, text) {
      page.texts.set(key, text);
      clearTimeout(page.typing);
      page.typing = setTimeout(flush, TYPING_MS);
    }

    /** Send what was typed, in order; what cannot be sent is kept and sent with the next. */
    function flush(keepalive = false) {
      clearTimeout(page.typing);
      if (!page.texts.size) return page.sending;
      const values = Object.fromEntries(page.texts);
      page.texts.clear();
      page.sending = page.sending.then(async () => {
        page.isSending = true;
        try {
          await post("api/train/fields", { values }, keepalive);
        } catch (error) {
          for (const [key, text] of Object.entries(values)) if (!page.texts.has(key)) page.texts.set(key, text);
          page.typing = setTimeout(flush, CALM_MS);
          message(`What was typed is not saved yet (${error.message}). Trying again.`);
        }
        page.isSending = false;
      });
      return page.sending.then(ask);
    }

    /** POST that notes the draft's revision, so that our own changes are not taken for another tab's. */
    async function post(address, body, keepalive = false) {
      const headers = { "content-type": "application/json" };
      const reply = await fetch(address, { method: "POST", headers, body: JSON.stringify(body), keepalive });
      const answer = await reply.json().catch(() => ({}));
      if (!reply.ok) throw new Error(answer.error ?? `the server answered ${reply.status}`);
      page.shownRevision = answer.revision;
      return answer;
    }

    // ---- fields -------------------------------------------------------------------------------------------------
    function showFields(state) {
      for (const wrapper of root.querySelectorAll(".sb-field")) {
        const key = state.keys[wrapper.id];
        const input = wrapper.querySelector("input, textarea");
        if (!input || !key) continue;
        const below = messageOf(wrapper, input);
        const problem = state.problems[key] ?? "";
        const note = state.notes[key] ?? "";
        wrapper.classList.toggle("sb-bad", problem !== "");
        wrapper.classList.toggle("sb-noted", !problem && note !== "");
        signalbox.say(below, problem || note);
        input.setAttribute("aria-invalid", String(problem !== ""));
      }
      for (const summary of root.querySelectorAll(".sb-summary")) signalbox.say(summary, state.summaries[summary.dataset.summary] ?? "");
    }

    /** The line under a field: help until there is a problem or a note; all of it belongs to the input for readers. */
    function messageOf(wrapper, input) {
      const id = `${wrapper.id}-message`;
      let node = by(id);
      if (node) return node;
      node = document.createElement("div");
      node.id = id;
      node.className = "sb-field-message";
      node.setAttribute("role", "status");
      const help = wrapper.querySelector(".info-text, [class*='info-text']");
      if (help) help.id = `${wrapper.id}-help`;
      wrapper.append(node);
      input.setAttribute("aria-describedby", `${wrapper.id}-help ${id}`);
      input.spellcheck = false;
      if (input.getAttribute("role") === "combobox") input.placeholder = "Choose";
      return node;
    }

    function goTo(key) {
      const wrapper = fieldOf(key);
      if (!wrapper) return;
      clearSearch();
      if (wrapper.classList.contains("sb-advanced") || wrapper.closest(".sb-group.sb-advanced")) view("all");
      openGroup(wrapper.closest(".sb-group"), true);
      wrapper.scrollIntoView({ block: "center" });
      wrapper.querySelector("input, textarea")?.focus({ preventScroll: true });
    }

    function openGroup(group, isOpen) {
      const button = group?.querySelector("[data-opens]");
      if (!button) return;
      group.classList.toggle("sb-closed", !isOpen);
      button.setAttribute("aria-expanded", String(isOpen));
    }

    function view(name) {
      root.dataset.view = name;
      localStorage.setItem("signalbox-view", name);
      for (const button of root.querySelectorAll("[data-view]")) if (button !== root) button.setAttribute("aria-pressed", String(button.dataset.view === name));
    }

    function clearSearch() {
      by("train-find").value = "";
      find();
    }

    /** Show only the settings whose name, key or help holds the words typed. */
    function find() {
      const words = by("train-find").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
      root.classList.toggle("sb-searching", words.length > 0);
      for (const wrapper of root.querySelectorAll(".sb-field")) {
        const text = `${wrapper.textContent} ${wrapper.id.slice(2)} ${wrapper.id.replaceAll(/[_-]/g, " ")}`.toLowerCase();
        wrapper.classList.toggle("sb-miss", words.length > 0 && !words.every((word) => text.includes(word)));
      }
      for (const group of root.querySelectorAll(".sb-group")) {
        const hits = group.querySelectorAll(".sb-field:not(.sb-miss)").length;
        group.classList.toggle("sb-no-hit", words.length > 0 && hits === 0);
      }
      const hits = root.querySelectorAll(".sb-field:not(.sb-miss)").length;
      signalbox.say(by("train-said"), words.length ? (hits ? `${hits} setting${hits > 1 ? "s" : ""} found` : "No setting has these words.") : "");
    }

    // ---- first screen -------------------------------------------------------------------------------------------
    function showTry(job) {
      by("train-try").disabled = Boolean(job?.running);
      by("train-try-bar").hidden = !job?.running;
      by("train-try-bar").firstElementChild.style.width = `${Math.round((job?.progress ?? 0) * 100)}%`;
      signalbox.say(by("train-try-said"), job?.text ?? "");
      by("train-try-said").className = job?.failed ? "sb-message" : "sb-help";
      if (job?.go && page.isTrying) location.assign(job.go);
    }

    async function tryIt() {
      by("train-try").disabled = true;
      page.isTrying = true;
      try {
        await post("api/train/try", {});
      } catch (error) {
        by("train-try-said").textContent = error.message;
        page.isTrying = false;
      }
      ask();
    }

    // ---- what people do -----------------------------------------------------------------------------------------
    function act(data) {
      trigger("click", data);
    }

    async function putBack(button) {
      try {
        by("train-save-message").textContent = (await post("api/train/restore", { name: button.dataset.name, backup: button.dataset.backup })).said;
        act({ act: "refresh" });
      } catch (error) {
        by("train-save-message").textContent = error.message;
      }
    }

    function keyOf(target) {
      return page.state?.keys[target.closest?.(".sb-field")?.id];
    }

    function isTextBox(target) {
      return target.matches('textarea, input[type="text"]') && target.getAttribute("role") !== "combobox";
    }

    /** Lines that judged a setting are out of date from the moment it is touched, not from the next answer on. */
    function grey(key) {
      for (const line of by("gate-lines").querySelectorAll(`[data-fields~="${CSS.escape(key)}"]`)) line.classList.add("sb-stale");
    }

    const CLICKS = {
      "[data-act]": (button) => {
        act(JSON.parse(button.dataset.act));
        if (by("train-suggestions").contains(button)) drawer("train-suggestions", false);
      },
      "[data-goto]": (button) => goTo(button.dataset.goto),
      "[data-closes]": (button) => drawer(button.dataset.closes, false),
      "[data-backup]": putBack,
      "button[data-view]": (button) => view(button.dataset.view),
      "[data-opens]": (button) => openGroup(by(button.dataset.opens), button.getAttribute("aria-expanded") === "false"),
      "#train-changes": () => drawer("train-diff", by("train-diff").hidden),
      "#train-save-as": () => {
        by("train-save-name").value = page.state?.base || "";
        drawer("train-save", by("train-save").hidden);
      },
      "#train-suggest": suggest,
      "#train-revert": () => act({ act: "revert" }),
      "#train-smoke, #bottom-smoke": () => go(page.state?.smoke_running ? "api/train/smoke-stop" : "api/train/smoke"),
      "#train-start, #bottom-start": () => go("api/train/start"),
      "#bottom-gate": () => by("gate").scrollIntoView(),
      "#train-try": tryIt,
      "#train-show-form": () => {
        page.wantsForm = true;
        ask();
      },
    };
    root.addEventListener("click", (event) => {
      for (const [selector, handler] of Object.entries(CLICKS)) {
        const button = event.target.closest(selector);
        if (button && root.contains(button)) return void handler(button);
      }
    });
    root.addEventListener("input", (event) => {
      const key = keyOf(event.target);
      if (key) grey(key);
      if (key && isTextBox(event.target)) typed(key, event.target.value);
      if (event.target.id === "train-find") find();
      if (event.target.id === "train-name" || event.target.id === "train-why") note(event.target);
    });
    root.addEventListener("change", (event) => {
      if (event.target.id === "train-config") act({ act: "pick", name: event.target.value });
    });
    by("train-save-form").addEventListener("submit", save);

    function note(input) {
      input.dataset.typing = "yes";
      clearTimeout(page.noting);
      page.noting = setTimeout(async () => {
        await post("api/train/note", { name: by("train-name").value, why: by("train-why").value });
        delete input.dataset.typing;
      }, NOTING_MS);
    }

    watch("value", () => {
      const signal = JSON.parse(props.value || "{}");
      if (signal.revision !== undefined) page.shownRevision = signal.revision;
      if (signal.said) message(signal.said);
      ask();
    });
    addEventListener("focus", ask);
    addEventListener("pagehide", () => flush(true));
    root.addEventListener("focusout", () => flush());
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && ask());
    view(localStorage.getItem("signalbox-view") === "all" ? "all" : "basic");
    signalbox.trainView?.(root);
    ask();
  }
})();
