// The header of every page: the link that says what is going on, the share panel, copy buttons, the window's title.
"use strict";
window.signalbox = window.signalbox || {};
window.signalbox.frame = (element) => {
  const POLL_MS = 2000;
  const SLOWEST_MS = 15000;
  const LIVE = ["preparing", "running", "pausing", "stopping"];
  const numbers = window.signalbox.numbers;
  const status = element.querySelector("#sb-status");
  const page = element.querySelector(".sb-header").dataset.page;
  let lastAnswer = Date.now();
  let wait = POLL_MS;

  const glyph = (name) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "sb-glyph");
    svg.setAttribute("aria-hidden", "true");
    svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "use")).setAttribute("href", `#g-${name}`);
    return svg;
  };
  const say = (name, tone, text, hint, href) => {
    const words = document.createElement("span");
    const parts = text.split(" · "); // on a phone the middle goes: "idle · 23.1 GiB free"
    parts.forEach((part, at) => {
      const span = words.appendChild(document.createElement("span"));
      span.textContent = at ? ` · ${part}` : part;
      if (at > 0 && at < parts.length - 1) span.className = "sb-wide";
    });
    status.replaceChildren(glyph(name), words);
    status.className = `sb-status sb-tone-${tone}`;
    status.title = hint || text;
    status.href = href || "live";
  };
  const progress = (run) => {
    if (run.state === "preparing") {
      const done = run.phase_total ? ` ${numbers.count(run.phase_done)}/${numbers.count(run.phase_total)}` : "";
      return `preparing${run.phase ? `: ${run.phase}${done}` : ""}`;
    }
    const steps = `${numbers.count(run.step)}/${numbers.count(run.total_steps)}`;
    const left = numbers.eta(run.eta_s, run.step);
    return run.state === "running" ? `${steps} · ${left}${left === "estimating" ? "" : " left"}` : `${run.state} · ${steps}`;
  };
  const show = (state) => {
    if (state.run) {
      const live = LIVE.includes(state.run.state);
      say(live ? state.run.state : "running", "run", progress(state.run), state.run.name);
    } else {
      say(state.advice ? "warning" : "idle", state.advice ? "warn" : "rest", `idle · ${state.machine}`, state.advice);
    }
    document.dispatchEvent(new CustomEvent("signalbox:state", { detail: state }));
  };

  const poll = async () => {
    if (!element.isConnected) return;
    if (document.visibilityState === "visible") {
      try {
        const reply = await fetch("api/state");
        if (!reply.ok) throw new Error(String(reply.status));
        show(await reply.json());
        lastAnswer = Date.now();
        wait = POLL_MS;
      } catch {
        wait = Math.min(wait * 1.5, SLOWEST_MS);
        const age = numbers.duration((Date.now() - lastAnswer) / 1000);
        if (Date.now() - lastAnswer > 5000) say("interrupted", "warn", `no answer for ${age}`, "The server does not answer. Trying again.");
      }
    }
    setTimeout(poll, wait);
  };

  const share = async () => {
    const health = await (await fetch("api/health")).json();
    document.getElementById("sb-ssh").textContent = `ssh -L ${health.port}:localhost:${health.port} user@host`;
    document.getElementById("sb-ssh-url").textContent = `http://localhost:${health.port}`;
  };
  const copy = async (button) => {
    const source = document.getElementById(button.dataset.copy);
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      // no clipboard outside localhost and https: select it, so that the keyboard can
      getSelection().selectAllChildren(source);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = before), 1500);
  };

  // with Gradio's <base>, "#sb-main" alone would lead to the first page
  element.querySelector(".sb-skip").addEventListener("click", (event) => {
    event.preventDefault();
    element.querySelector("#sb-main").focus();
  });
  document.title = page === "Train" ? "Signalbox" : `${page} · Signalbox`;
  element.querySelector("#sb-share").addEventListener("toggle", (event) => event.newState === "open" && share());
  if (!window.signalbox.copies) {
    window.signalbox.copies = true; // one listener a window, wherever the button stands
    document.addEventListener("click", (event) => {
      const button = event.target.closest("[data-copy]");
      if (button) copy(button);
    });
  }
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && (wait = POLL_MS));
  poll();
};
