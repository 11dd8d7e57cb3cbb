// What the title, the progress line and the key figures say, each from the model alone.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, chip, say } = signalbox;
  const METHODS = { lora: "LoRA", qlora: "QLoRA", full: "full" };
  const ASIDE = { eval: "measuring held-out loss", sample: "writing samples", save: "saving a checkpoint" };
  const NOT_PREPARING = ["check", "train", "eval", "save", "sample"];
  const AWAY_S = 600;
  const REMEMBERED = 30;

  const hours = { hour: "2-digit", minute: "2-digit", hour12: false };
  const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], hours);
  const known = (value) => (Number.isFinite(value) ? value : null);

  /** Title, state, progress, phases of preparing, actions. */
  function showHead(board) {
    const { status, fast, isLive } = board.model, { parts } = board, n = signalbox.numbers;
    const rank = status.method === "full" ? "" : ` r${status.rank ?? "–"}`;
    const method = `${METHODS[status.method] ?? status.method}${rank}`;
    say(parts.title, status.name || `${status.model} · ${method}`);
    say(parts.model, status.name ? status.model : "");
    showFacts(board, method);
    if (board.shownState !== fast.state) {
      board.shownState = fast.state;
      parts.state.replaceChildren(chip(fast.state));
      say(parts.spoken, `The run is ${fast.state}.`);
    }
    const share = fast.total ? Math.min(fast.step / fast.total, 1) : 0;
    parts.bar.style.width = `${share * 100}%`;
    parts.track.setAttribute("aria-valuemax", fast.total ?? 0);
    parts.track.setAttribute("aria-valuenow", fast.step);
    parts.track.setAttribute("aria-valuetext", `step ${fast.step} of ${fast.total ?? "not known yet"}`);
    say(parts.steps, fast.total ? `${n.count(fast.step)} / ${n.count(fast.total)}` : n.count(fast.step));
    say(parts.left, isLive ? [timeLeft(fast), ASIDE[fast.phase]].filter(Boolean).join(" · ") : "");
    const safe = board.hasTerminal ? "Safe to close this tab, not the server's terminal (--detach needs none)" : "Safe to close this tab";
    say(parts.safe, isLive ? safe : "");
    showPreparing(board);
    board.actions.update();
  }

  function showFacts(board, method) {
    const { status } = board.model, n = signalbox.numbers;
    const facts = [
      ["Run", status.run_id],
      ["Model", status.model],
      ["Method", method],
      ["Approximate", status.approximate],
      ["Data", (status.data ?? []).join(", ")],
      ["Profile", status.profile ?? "none"],
      ["Device", status.device],
      ["Started", status.started_at && n.when(status.started_at, Date.now() / 1000)],
      ["By", status.owner],
      ["Why", status.why],
    ].filter(([, value]) => value);
    const text = JSON.stringify(facts);
    if (board.factsText === text) return;
    board.factsText = text;
    board.parts.facts.replaceChildren(...facts.flatMap(([name, value]) => [el("dt", name), el("dd", value)]));
  }

  /** "12 min left, done about 14:32", with the day when it is another one. */
  function timeLeft(fast) {
    if (fast.state !== "running") return "";
    if (fast.eta_s === null) return "estimating the time left";
    const done = new Date(Date.now() + fast.eta_s * 1000);
    const isToday = done.toDateString() === new Date().toDateString();
    const day = isToday ? "" : ` ${done.toLocaleDateString([], { weekday: "short" })}`;
    return `${signalbox.numbers.duration(fast.eta_s)} left, done about${day} ${clock(done.getTime() / 1000)}`;
  }

  /** 1 check 2 tokenise 8,100/12,408 3 load 62 % 4 first step */
  function showPreparing(board) {
    const { fast } = board.model, list = board.parts.preparing, n = signalbox.numbers;
    list.hidden = !(fast.state === "preparing" || (fast.state === "running" && fast.step === 0));
    if (list.hidden) return;
    const seen = new Set(board.model.of("phase").map((event) => event.name));
    const order = ["check", ...[...seen].filter((name) => !NOT_PREPARING.includes(name)), "first step"];
    const at = fast.state === "running" ? order.length - 1 : Math.max(order.indexOf(fast.phase), 0);
    const done = fast.of === 100 ? n.percent(fast.done, fast.of) : `${n.count(fast.done)}/${n.count(fast.of)}`;
    list.replaceChildren(...order.map((name, i) => {
      const kind = i < at ? ".is-done" : i === at ? ".is-now" : "";
      const settings = i === at ? { "aria-current": "step" } : {};
      return el(`li${kind}`, settings, i === at && fast.of ? `${name} ${done}` : name);
    }));
  }

  // ---- figures -------------------------------------------------------------------------------------------------

  /** The four key figures, and the table of last values for those who cannot see the curve. */
  function showFigures(board) {
    const { model } = board, { figure } = board.parts, n = signalbox.numbers;
    const loss = model.series.loss?.y.length ? model.last(model.series.loss) : null;
    figure.Loss(n.loss(loss), model.change() ?? "", Number.isNaN(loss) ? "bad" : "");
    const heldOut = model.status.held_out ?? null;
    figure["Held-out"](n.loss(heldOut), heldOut === null ? "not measured yet" : model.gap());
    const used = showMemory(board);
    const pace = model.isLive ? model.pace() : { text: "median of the run", tone: "" };
    figure.Speed(n.speed(known(model.isLive ? model.fast.speed : model.middleSpeed())), pace.text, pace.tone);
    showLastValues(board, loss, heldOut, used);
  }

  /** On a GPU the device against its limit, on a CPU the process; of an ended run its peak. Returns what is shown. */
  function showMemory({ model, parts }) {
    const n = signalbox.numbers, gpu = Boolean(model.heat.device_gib);
    const column = gpu ? "device_gib" : "process_gib";
    const peak = known(model.peak(column)), used = model.isLive ? known(model.last(model.heat[column])) : peak;
    const limit = gpu ? known(model.last(model.heat.limit_gib)) : null;
    const text = limit === null ? n.memory(used) : `${used === null ? "–" : used.toFixed(1)} / ${n.memory(limit)}`;
    const peakText = model.isLive ? peak !== null && `peak ${n.memory(peak)}` : "peak of the run";
    parts.figure.Memory(text, [peakText, !gpu && "main memory"].filter(Boolean).join(", "));
    const isUnmeasured = model.status.on_gpu && (model.heat.process_gib?.x.length ?? 0) > 2;
    const main = isUnmeasured ? "Memory of the process, GiB (the GPU's is not available: its driver does not answer)"
      : "Memory of the process (on the CPU), GiB";
    say(parts.memoryTitle, gpu ? "Memory, GiB" : main);
    return used;
  }

  function showLastValues({ model, lastValues }, loss, heldOut, used) {
    const n = signalbox.numbers, { fast, series } = model;
    const rows = [
      ["Step", n.count(fast.step)],
      ["Loss", n.loss(loss)],
      ["Held-out loss", n.loss(heldOut)],
      ["Memory", n.memory(used)],
      ["Learning rate", n.rate(known(model.last(series.learning_rate)))],
      ["Gradient norm", n.grad_norm(known(model.last(series.grad_norm)))],
    ].map(([name, value]) => el("tr", el("th", { scope: "row" }, name), el("td", value)));
    lastValues.replaceChildren(el("caption", "Last values"), el("tbody", rows));
  }

  // ---- coming back ---------------------------------------------------------------------------------------------

  /** "Since you last looked (23:10): …" once, for somebody who was away for ten minutes; and remember this look. */
  function showSinceLast(board) {
    const seen = remembered(), before = seen[board.runId], now = Date.now() / 1000;
    if (before && !board.hasGreeted && now - before.at > AWAY_S) {
      board.parts.back.hidden = false;
      const when = signalbox.numbers.when(before.at, now);
      say(board.parts.back, `Since you last looked (${when}): ${news(board.model, before).join(" · ")}.`);
    }
    board.hasGreeted = true;
    const { model } = board;
    seen[board.runId] = { at: now, step: model.fast.step, loss: known(model.last(model.smoothed)) };
    const newest = Object.entries(seen).sort(([, a], [, b]) => b.at - a.at).slice(0, REMEMBERED);
    remember(Object.fromEntries(newest));
  }

  function news(model, before) {
    const n = signalbox.numbers, loss = model.last(model.smoothed);
    const counted = (word, ...kinds) => {
      const count = model.of(word, ...kinds).filter((event) => event.t > before.at).length;
      return count > 0 && `${count} ${word}${count === 1 ? "" : "s"}`;
    };
    const moved = before.loss !== null && Number.isFinite(loss) && `loss ${n.loss(before.loss)} → ${n.loss(loss)}`;
    const steps = `${n.count(Math.max(model.fast.step - before.step, 0))} steps`;
    return [steps, moved, counted("checkpoint"), counted("alert", "bad_row")].filter(Boolean);
  }

  // a browser may forbid storage; then nobody is greeted, and nothing else is lost
  function remembered() {
    try {
      return JSON.parse(localStorage.getItem("signalbox.seen") ?? "{}");
    } catch {
      return {};
    }
  }

  function remember(seen) {
    try {
      localStorage.setItem("signalbox.seen", JSON.stringify(seen));
    } catch {
      return;
    }
  }

  Object.assign(signalbox, { showHead, showFigures, showSinceLast, clock });
})();
