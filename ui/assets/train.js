// The Train page: asks api/train/state, puts the answer in place, and sends every button's act to the server.
// Markup in answers is made and escaped by ui/pages/train_html.py; what people typed goes in through textContent here.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const CALM_MS = 5000;
  const PENDING_MS = 700;
  const NOTING_MS = 400;
  const by = (id) => document.getElementById(id);

  const PARTS = ["train-toolbar", "train-first", "gate", "train-view", "train-bottom", "f-hyperparams-method"];

  /** Gradio puts the parts of a page in place in no fixed order; begin when all of them are there. */
  signalbox.train = (...given) => (PARTS.every(by) ? begin(...given) : setTimeout(() => signalbox.train(...given), 20));

  function begin(element, trigger, watch, props) {
    const root = by("train");
    const fields = signalbox.trainFields(root, { ask, message, state: () => page.state, refresh: () => act({ act: "refresh" }) });
    const page = { state: null, timer: 0, isAsking: false, again: false, failures: 0 };

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
      page.state = state;
      if (page.failures > 1) message("");
      const first = state.empty && !page.wantsForm;
      by("train-first").hidden = !first;
      for (const id of ["train-columns", "train-bottom", "train-toolbar"]) by(id).hidden = first;
      showTry(state.try_it);
      showToolbar(state);
      showGate(state);
      fields.show(state);
      // another tab of this session has changed the draft: show it here too (an older state was merely on its way)
      if (state.form_revision > (fields.shownRevision ?? Infinity) && !fields.isBusy()) act({ act: "refresh" });
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
        const answer = await fields.post("api/train/save", { name: by("train-save-name").value });
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
      if (!by("form-fit")) by("f-hyperparams-method").after(signalbox.el("div", { id: "form-fit" }));
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
      await fields.flush();
      for (const id of ["train-start", "bottom-start", "train-smoke", "bottom-smoke"]) by(id).disabled = true;
      try {
        const answer = await fields.post(address, {});
        if (answer.go) return void location.assign(answer.go);
        message(answer.said ?? "", false);
      } catch (error) {
        message(error.message);
        by("gate").scrollIntoView({ block: "nearest" });
      }
      ask();
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
        await fields.post("api/train/try", {});
      } catch (error) {
        by("train-try-said").textContent = error.message;
        page.isTrying = false;
      }
      ask();
    }

    // ---- what people do -----------------------------------------------------------------------------------------
    function act(data) {
      fields.expect();
      trigger("click", data);
    }

    async function putBack(button) {
      try {
        by("train-save-message").textContent = (await fields.post("api/train/restore", { name: button.dataset.name, backup: button.dataset.backup })).said;
        act({ act: "refresh" });
      } catch (error) {
        by("train-save-message").textContent = error.message;
      }
    }

    const CLICKS = {
      "[data-act]": (button) => {
        act(JSON.parse(button.dataset.act));
        if (by("train-suggestions").contains(button)) drawer("train-suggestions", false);
      },
      "[data-goto]": (button) => fields.goTo(button.dataset.goto),
      "[data-closes]": (button) => drawer(button.dataset.closes, false),
      "[data-backup]": putBack,
      "button[data-view]": (button) => fields.view(button.dataset.view),
      "[data-opens]": (button) => fields.openGroup(by(button.dataset.opens), button.getAttribute("aria-expanded") === "false"),
      "#train-changes": () => drawer("train-diff", by("train-diff").hidden),
      "#train-save-as": () => {
        by("train-save-name").value = page.state?.base || "";
        drawer("train-save", by("train-save").hidden);
      },
      "#train-suggest": suggest,
      "#train-revert": () => act({ act: "revert" }),
      "#train-smoke, #bottom-smoke": () => go(page.state?.smoke_running ? "api/train/smoke-stop" : "api/train/smoke"),
      "#train-start, #bottom-start": () => go("api/train/start"),
      "[data-queue]": () => go("api/train/queue"),
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
      if (event.target.type !== "checkbox" && event.target.type !== "radio") fields.touched(event.target);
      if (event.target.id === "train-find") fields.find();
      if (event.target.id === "train-name" || event.target.id === "train-why") note(event.target);
    });
    root.addEventListener("change", (event) => {
      if (event.target.type === "checkbox" || event.target.type === "radio") fields.touched(event.target);
      if (event.target.id === "train-config") act({ act: "pick", name: event.target.value });
    });
    by("train-save-form").addEventListener("submit", save);

    function note(input) {
      input.dataset.typing = "yes";
      clearTimeout(page.noting);
      page.noting = setTimeout(async () => {
        await fields.post("api/train/note", { name: by("train-name").value, why: by("train-why").value });
        delete input.dataset.typing;
      }, NOTING_MS);
    }

    watch("value", () => {
      const signal = JSON.parse(props.value || "{}");
      if (signal.revision !== undefined) fields.answered(signal.revision);
      if (signal.said) message(signal.said);
      ask();
    });
    addEventListener("focus", ask);
    addEventListener("pagehide", () => fields.flush(true));
    root.addEventListener("focusout", (event) => {
      fields.left(event.target);
      fields.flush();
    });
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && ask());
    fields.view(localStorage.getItem("signalbox-view") === "all" ? "all" : "basic");
    signalbox.trainView?.(root);
    signalbox.trainBatch?.(fields);
    signalbox.trainNotify?.(root, fields);
    signalbox.trainFiles?.();
    ask();
  }
})();
