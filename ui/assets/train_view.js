// "What the model will see": one row of the chosen data, as coloured tokens or as text before and after the profile.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const WAIT_MS = 300;

  signalbox.trainView = (root) => {
    const { el, say } = signalbox;
    const by = (id) => document.getElementById(id);
    const view = { mode: "tokens", mark: null, answer: null, timer: 0, asked: 0 };

    function number() {
      return Math.max(1, parseInt(by("view-row").value, 10) || 1);
    }

    async function load() {
      const asked = ++view.asked;
      const body = by("view-body");
      body.classList.add("sb-stale");
      try {
        const answer = await signalbox.send(`api/train/row?n=${number()}`);
        if (asked !== view.asked) return; // a later question is on its way
        view.answer = answer;
      } catch (error) {
        if (asked !== view.asked) return;
        view.answer = { said: error.message };
      }
      body.classList.remove("sb-stale");
      draw();
    }

    function soon() {
      clearTimeout(view.timer);
      view.timer = setTimeout(load, WAIT_MS);
    }

    function draw() {
      const { answer } = view;
      if (!answer) return;
      by("view-profile").replaceChildren(...profile(answer.profile));
      if (document.activeElement !== by("view-row")) by("view-row").value = String(answer.row ?? number());
      by("view-next").disabled = !answer.rows || answer.row >= answer.rows;
      by("view-back").disabled = number() <= 1;
      if (answer.said) return by("view-body").replaceChildren(...(answer.facts ? [facts(answer)] : []), el("p", answer.said));
      by("view-body").replaceChildren(facts(answer), ...(view.mode === "tokens" ? tokens(answer) : texts(answer)));
      const box = by("view-body").querySelector(".sb-fold");
      if (box && box.clientHeight && box.scrollHeight <= box.clientHeight) box.nextElementSibling.hidden = true; // all of it is there already
    }

    function profile(info) {
      if (!info) return [];
      const parts = [el("p.sb-help", `${info.name}: ${info.description}`)];
      if (info.system_prompt) parts.push(el("p.sb-prompt", el("span.sb-help", "System prompt: "), info.system_prompt));
      return parts;
    }

    function facts(answer) {
      return el("p.sb-help", answer.facts);
    }

    function tokens(answer) {
      const pieces = answer.tokens.map(([text, kind]) => el(`span.sb-tok${kind === "context" ? "" : `.sb-tok-${kind}`}`, text));
      const box = el("div.sb-tokens.sb-fold", { tabindex: "0", "aria-label": "Tokens of the row" }, ...pieces);
      const legend = el(
        "p.sb-help.sb-legend",
        el("span.sb-tok-label", "label"), " is learned · ",
        el("span", "context"), " is read · ",
        el("span.sb-tok-cut", "cut"), " does not fit · ",
        el("span.sb-tok-special", "mark"), " is a special token",
      );
      return [box, more(box), legend];
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

    function texts(answer) {
      const column = (title, messages) =>
        el("div.sb-turns", el("h3.sb-help", title), ...messages.map((m) => el("div.sb-turn", el("span.sb-help", m.role), el("div.sb-said", m.content))));
      if (JSON.stringify(answer.before) === JSON.stringify(answer.after)) return [column("The row; the profile changes nothing in it", answer.after)];
      return [el("div.sb-two", column("In the file", answer.before), column("As it is trained", answer.after))];
    }

    function step(by_) {
      by("view-row").value = String(Math.max(1, number() + by_));
      load();
    }

    by("view-back").addEventListener("click", () => step(-1));
    by("view-next").addEventListener("click", () => step(1));
    by("view-row").addEventListener("input", soon);
    by("train-view").addEventListener("click", (event) => {
      const button = event.target.closest("button[data-mode]");
      if (!button) return;
      view.mode = button.dataset.mode;
      for (const other of by("train-view").querySelectorAll("button[data-mode]")) other.setAttribute("aria-pressed", String(other === button));
      draw();
    });
    // the row is shown again when something that changes it has changed
    document.addEventListener("signalbox:train", (event) => {
      if (event.detail.view_mark === view.mark) return;
      view.mark = event.detail.view_mark;
      load();
    });
  };
})();
