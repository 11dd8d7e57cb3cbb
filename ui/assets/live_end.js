// How a run ended, in words: first what is safe, then the next action as a button. Used by live.js.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button } = signalbox;

  /** The content of the notice for the state that the run is in. */
  function runEnd(board) {
    const { model } = board, { state } = model.fast;
    const end = model.events.findLast((event) => event.kind === state) ?? {};
    const tell = { stopped, finished, paused, failed, diverged, interrupted }[state];
    const { title, lines } = tell(model, end, signalbox.numbers);
    const glyph = signalbox.glyph(state);
    const detail = end.detail && el("details", el("summary", "Full text"), el("pre.sb-live-detail", end.detail));
    return [
      el(`p.sb-live-endtitle.sb-tone-${signalbox.tone(state)}`, glyph, el("span", title)),
      ...lines.filter(Boolean).map((line) => el("p", line)),
      el("div.sb-live-next", nextSteps(board, state, end)),
      detail || "",
    ];
  }

  function nextSteps(board, state, end) {
    const { status } = board.model, safe = status.saved_step, n = signalbox.numbers;
    const settle = settling(board, status.allowed);
    if (safe === null) return [el("a.sb-button", { href: "./" }, "Change the settings"), ...settle];
    const resume = ["paused", "stopped"].includes(state) ? "Resume" : `Resume from ${n.count(safe)}`;
    const hasRows = end.step > 0 && ["failed", "diverged"].includes(state);
    const copy = () => navigator.clipboard.writeText(report(board.model, end));
    const canGoAround = status.allowed.includes("resume-around") && end.rows?.length > 0;
    const around = `Resume from ${n.count(safe)} at half the rate, without ${end.rows?.length === 1 ? "that row" : "those rows"}`;
    return [
      canGoAround && button(around, () => board.actions.command("resume-around"), "primary"),
      status.allowed.includes("resume") && button(resume, () => board.actions.command("resume"), canGoAround ? "" : "primary"),
      ...settle,
      button("Use this model", () => board.panels.open("Checkpoints")),
      hasRows && button(`Rows of step ${n.count(end.step)}`, () => board.panels.showRows(end.step)),
      state === "failed" && button("Copy report", copy),
      status.processes > 1 && state !== "finished" && el("span.sb-help", `Of ${status.processes} processes: resumed by torchrun alone.`),
    ].filter(Boolean);
  }

  /** What ends the waiting of a run that nobody trains; nothing is deleted by it. */
  function settling(board, allowed) {
    const words = { leave: "Leave it", discard: "End it here" };
    const known = Object.keys(words).filter((command) => allowed.includes(command));
    return known.map((command) => button(words[command], () => board.actions.command(command)));
  }

  // ---- the states: each gives a title and lines ------------------------------------------------------------------

  function stopped(model, end, n) {
    const title = end.command === "leave" ? `Cut off, and left${by(end)}. The last good step is ${n.count(end.step)}.`
      : `Stopped${by(end)} at step ${n.count(end.step ?? model.fast.step)}.`;
    return { title, lines: [sentence(saved(model, end, n), freed(model, end, n))] };
  }

  function paused(model, end, n) {
    const title = `Paused${by(end)} at step ${n.count(end.step ?? model.fast.step)}.`;
    return { title, lines: [sentence(saved(model, end, n), freed(model, end, n), "Resume goes on from here.")] };
  }

  function finished(model, end, n) {
    const { best, best_step: bestStep } = model.status, { clock } = model;
    const took = clock.y.length ? ` in ${n.duration(model.worked(model.last(clock)) - model.worked(model.began))}` : "";
    const title = `Finished ${steps(model.fast.step, n)}${took}${end.cause ? `: ${end.cause}` : ""}.`;
    const bestText = best == null ? null : `Best held-out loss ${n.loss(best)} at step ${n.count(bestStep)}.`;
    return { title, lines: [sentence(saved(model, end, n), bestText, freed(model, end, n))] };
  }

  function failed(model, end, n) {
    const step = end.step ?? model.fast.step, at = end.t ? `, ${signalbox.clock(end.t)}` : "";
    const where = step ? `Failed at step ${n.count(step)}${at}` : `Failed before the first step${at}`;
    const title = `${where} · ${model.status.cause ?? "no cause was written"}`;
    return { title, lines: [sentence(`Safe: ${safe(model, n)}`, lost(model, n)), freed(model, end, n)] };
  }

  function diverged(model, end, n) {
    const title = `Stopped: ${model.status.cause ?? "the loss is no number any more."}`;
    return { title, lines: [`Last good: ${safe(model, n)}`, freed(model, end, n)] };
  }

  function interrupted(model, end, n) {
    const { status, fast } = model;
    const sign = status.t0 + Math.max(known(model.last(model.clock)), known(model.lastSignBefore(Infinity)));
    const why = status.cause ? `: ${status.cause}` : "";
    const cause = `the server ended without stopping${why}; last sign ${signalbox.clock(sign)}`;
    const repeated = status.saved_step === null ? 0 : fast.step - status.saved_step;
    const again = repeated > 0 ? `${steps(repeated, n)} will be repeated.` : null;
    const title = `Cut off at step ${n.count(fast.step)} (${cause}).`;
    return { title, lines: [sentence(`Safe: ${safe(model, n)}`, again), waits(status)] };
  }

  /** Why a run that may go on by itself does not do so this time. */
  function waits({ resumed_itself: count, resumes_allowed: most }) {
    if (!most || count < most) return null;
    return `It went on by itself ${count === 1 ? "once" : `${count} times`} since somebody last started it, and waits for you now.`;
  }

  // ---- the parts of the sentences --------------------------------------------------------------------------------

  const by = (end) => (end.by ? ` by ${end.by}` : "");
  const known = (value) => (Number.isFinite(value) ? value : 0);
  const sentence = (...parts) => parts.filter(Boolean).join(" ");
  const steps = (count, n) => `${n.count(count)} step${count === 1 ? "" : "s"}`;

  function saved(model, end, n) {
    const step = end.saved_step ?? model.status.saved_step;
    if (step === null) return "Nothing was saved yet.";
    const event = model.events.findLast((e) => e.kind === "checkpoint" && e.step === step);
    const bytes = end.saved_bytes ?? event?.bytes;
    return `Saved: step ${n.count(step)}${bytes ? ` (${n.disk(bytes)})` : ""}.`;
  }

  function freed(model, end, n) {
    const { memory_before_gib: before, memory_after_gib: after } = end;
    if (before == null || after == null) return null;
    if (!model.status.on_gpu) return `Memory ${n.memory(before)} → ${n.memory(after)}.`;
    const rest = "the rest is the CUDA context, freed when the server ends";
    return `GPU memory ${n.memory(before)} → ${n.memory(after)}; ${rest}.`;
  }

  function safe(model, n) {
    const step = model.status.saved_step;
    return step === null ? "nothing; no checkpoint was written yet." : `step ${n.count(step)}.`;
  }

  function lost(model, n) {
    const from = model.status.saved_step ?? 0, gone = model.fast.step - from;
    if (gone <= 0) return null;
    const seconds = model.timeOf(model.fast.step) - model.timeOf(from);
    return `Lost: ${steps(gone, n)}${seconds > 0 ? ` (${n.duration(seconds)})` : ""}.`;
  }

  function report(model, end) {
    const { status, fast } = model;
    return [
      `run ${status.run_id}: ${fast.state} at step ${fast.step} of ${fast.total}`,
      `model ${status.model}, ${status.method}, profile ${status.profile}`,
      `data ${(status.data ?? []).join(", ")}`,
      `device ${status.device}`,
      `cause ${status.cause}`,
      end.detail ?? "",
    ].join("\n");
  }

  signalbox.runEnd = runEnd;
})();
