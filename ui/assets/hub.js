// A model by its id: the field, the bar, cancel, and what was begun and not finished. Polls `api/hub`, which every tab shares.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const BUSY_MS = 500;
  const HINT = "Organisation and name on the hub, such as Qwen/Qwen3-0.6B. Weights as safetensors, tokenizer and templates are fetched; code never.";

  /** The panel; `onArrived(folder)` hears of a model that is whole. */
  signalbox.hubPanel = (onArrived) => {
    const { el, button, field, say } = signalbox;
    const id = el("input.sb-input", { type: "text", autocomplete: "off", spellcheck: "false", maxlength: 200, placeholder: "organisation/name" });
    id.id = "sb-model-id";
    id.size = 28; // as wide as a phone allows
    const said = el("p.sb-help.sb-upload-said", { role: "status" }, HINT);
    const fill = el("i");
    const bar = el("div.sb-bar.sb-idle", { role: "progressbar", "aria-label": "Download", "aria-valuemin": 0, "aria-valuemax": 100 }, fill);
    const left = el("div.sb-stack8");
    const start = button("Download", () => begin(id.value.trim()));
    const cancel = button("Cancel", () => ask("cancel", {}));
    cancel.hidden = true;
    id.addEventListener("keydown", (event) => event.key === "Enter" && !start.disabled && begin(id.value.trim()));
    let watched = null;
    let timer = null;

    const tell = (text, isBad) => {
      said.className = isBad ? "sb-upload-said sb-tone-bad" : "sb-help sb-upload-said";
      say(said, text);
    };

    async function ask(what, body) {
      try {
        await signalbox.send(`api/hub/${what}`, body);
      } catch (error) {
        tell(error.message, true);
        return false;
      }
      look();
      return true;
    }

    async function begin(text) {
      watched = "next";
      tell("Asking the hub.", false);
      if (!(await ask("download", { id: text }))) watched = null;
    }

    async function look() {
      clearTimeout(timer);
      let now;
      try {
        now = await signalbox.send("api/hub");
      } catch {
        timer = setTimeout(look, 4 * BUSY_MS);
        return;
      }
      const isRunning = now.state === "running";
      start.disabled = isRunning;
      cancel.hidden = !isRunning;
      bar.classList.toggle("sb-idle", !isRunning);
      const share = now.total ? Math.floor((100 * now.done) / now.total) : 0;
      fill.style.width = `${share}%`;
      bar.setAttribute("aria-valuenow", share);
      left.replaceChildren(...now.left.map(unfinished));
      if (isRunning) {
        watched = now.job;
        tell(now.total ? `${now.text} (${share} %)` : now.text, false);
        timer = setTimeout(look, BUSY_MS);
      } else if (watched !== null) {
        watched = null;
        if (now.state === "done") {
          tell(`${now.model} is here, as ${now.folder}. Every file has the size and content that the hub announced.`, false);
          id.value = "";
          onArrived(now.folder);
        } else tell(now.error ?? "The download did not come to its end.", now.state !== "cancelled");
      }
    }

    function unfinished({ id: name, text }) {
      const resume = button("Resume", () => begin(name));
      resume.disabled = start.disabled;
      return el("div.sb-row", el("span", el("code", name), `: ${text}.`), resume,
        button("Throw away", () => confirm(`Throw away what has arrived of ${name}?`) && ask("discard", { id: name })));
    }

    look();
    return el("section.sb-panel.sb-upload", { "aria-label": "Download a model" },
      el("div.sb-row.sb-end", field("Model id", id), start, cancel),
      bar, said, left);
  };
})();
