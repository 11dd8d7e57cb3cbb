// The form of the Train page: what is typed goes to the draft, what is wrong stands under its field, settings are found.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const TYPING_MS = 40; // the memory bar is to move while somebody types
  const AGAIN_MS = 5000;
  const ANSWER_MS = 2000;
  const SETTLE_MS = 60;
  const by = (id) => document.getElementById(id);
  const fieldOf = (key) => by(`f-${key.replaceAll(".", "-")}`);

  /** `page` gives `ask()`, `refresh()`, `message(text)` and `state()`; the result is used by train.js alone. */
  signalbox.trainFields = (root, page) => {
    const fields = { shownRevision: undefined, texts: new Map(), sending: Promise.resolve(), posting: 0, timer: 0, expectedUntil: 0 };

    // ---- what is typed ------------------------------------------------------------------------------------------
    function typed(key, text) {
      fields.texts.set(key, text);
      clearTimeout(fields.timer);
      fields.timer = setTimeout(flush, TYPING_MS);
    }

    /** Send what was typed, in order; what cannot be sent is kept and sent with the next. */
    function flush(keepalive = false) {
      clearTimeout(fields.timer);
      if (!fields.texts.size) return fields.sending;
      const values = Object.fromEntries(fields.texts);
      fields.texts.clear();
      fields.sending = fields.sending.then(async () => {
        try {
          const answer = await post("api/train/fields", { values }, keepalive);
          if (answer.others) page.refresh();
        } catch (error) {
          if (error.isRefusal) return page.message(error.message);
          for (const [key, text] of Object.entries(values)) if (!fields.texts.has(key)) fields.texts.set(key, text);
          fields.timer = setTimeout(flush, AGAIN_MS);
          page.message(`What was typed is not saved yet (${error.message}). Trying again.`);
        }
      });
      return fields.sending.then(page.ask);
    }

    /** POST that notes the draft's revision, so that our own changes are not taken for another tab's. */
    async function post(address, body, keepalive = false) {
      const headers = { "content-type": "application/json" };
      fields.posting += 1;
      let reply, answer;
      try {
        reply = await fetch(address, { method: "POST", headers, body: JSON.stringify(body), keepalive });
        answer = await reply.json().catch(() => ({}));
      } finally {
        fields.posting -= 1;
      }
      if (!reply.ok) throw Object.assign(new Error(answer.error ?? `the server answered ${reply.status}`), { isRefusal: reply.status < 500 });
      fields.shownRevision = answer.revision;
      return answer;
    }

    // ---- fields -------------------------------------------------------------------------------------------------
    function show(state) {
      // an answer to all that was typed: what it says the same as before is true again
      if (!isBusy()) for (const line of by("gate-lines").querySelectorAll(".sb-touched")) line.classList.remove("sb-touched");
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

    function keyOf(target) {
      return page.state()?.keys[target.closest?.(".sb-field")?.id];
    }

    function isTextBox(target) {
      return target.matches('textarea, input[type="text"]') && target.getAttribute("role") !== "combobox";
    }

    /** Lines that judged a setting are out of date from the moment it is touched, not from the next answer on. */
    function grey(key) {
      const judging = `[data-fields~="${CSS.escape(key)}"], [data-fields="*"]`;
      for (const line of by("gate-lines").querySelectorAll(judging)) line.classList.add("sb-touched");
    }

    /** A text box, a switch or a segment has a new value. */
    function touched(target) {
      const key = keyOf(target);
      if (!key) return;
      grey(key);
      if (target.type === "checkbox") typed(key, String(target.checked));
      else if (target.type === "radio") typed(key, target.value);
      else if (isTextBox(target)) typed(key, target.value);
    }

    /** A dropdown is left, which is also how a choice ends; Gradio puts the choice's words into its box by then. */
    function left(target) {
      const key = keyOf(target);
      if (key && target.getAttribute("role") === "combobox") setTimeout(() => picked(key, target.value), SETTLE_MS);
    }

    function picked(key, words) {
      const { choices, texts } = page.state();
      const text = choices[key].find(([label]) => label === words)?.[1] ?? words;
      if (text === (fields.texts.get(key) ?? texts[key])) return;
      grey(key);
      typed(key, text);
    }

    /** A button has been used: its own answer is on the way and will tell the new revision. */
    function expect() {
      fields.expectedUntil = Date.now() + ANSWER_MS;
    }

    function answered(revision) {
      fields.shownRevision = revision;
      fields.expectedUntil = 0;
    }

    const isBusy = () => fields.texts.size > 0 || fields.posting > 0 || Date.now() < fields.expectedUntil;
    return Object.assign(fields, { flush, post, show, goTo, openGroup, view, find, touched, left, expect, answered, isBusy });
  };
})();
