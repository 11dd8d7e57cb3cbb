// How a run ended, in words: first what is safe, then the next action as a button. Used by live.js.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const { el, button } = signalbox;

  /** The content of the notice for the state the run is in. */
  function runEnd(board) {
    const { model } = board, { state } = model.fast, n = signalbox.numbers;
    const end = model.events.findLast((event) => event.kind === state) ?? {};
    const words = { stopped, finished, paused, failed, diverged, interrupted }[state](model, end, n);
    const resume = (model.status.allowed ?? []).includes("resume");
    const safe = model.status.saved_step;
    const next = [
      resume && safe !== null && button(resumeWord(state, safe, n), () => board.actions.command("resume"), "primary"),
      ["stopped", "finished", "failed", "diverged", "interrupted", "paused"].includes(state) && safe !== null &&
        button("Use this model", () => board.panels.open("Checkpoints")),
      end.step > 0 && ["failed", "diverged"].includes(state) && button(`Rows of step ${n.count(end.step)}`, () => board.panels.showRows(end.step)),
      state === "failed" && button("Copy report", () => copy(report(model, end))),
      safe === null && el("a.sb-button", { href: "./" }, "Change the settings"),
    ].filter(Boolean);
    const title = el(`p.sb-live-endtitle.sb-tone-${signalbox.tone(state)}`, signalbox.glyph(state), el("span", words.title));
    const detail = end.detail && el("details", el("summary", "Full text"), el("pre.sb-live-detail", end.detail));
    return [title, ...words.lines.map((line) => el("p", line)), el("div.sb-live-next", next), detail].filter(Boolean);
  }

  const resumeWord = (state, safe, n) => (["paused", "stopped"].includes(state) ? "Resume" : `Resume from ${n.count(safe)}`);

  function saved(model, end, n) {
    const step = end.saved_step ?? model.status.saved_step;
    if (step === null || step === undefined) return "Nothing was saved yet.";
    const bytes = end.saved_bytes ?? model.events.findLast((e) => e.kind === "checkpoint" && e.step === step)?.bytes;
    return `Saved: step ${n.count(step)}${bytes ? ` (${n.disk(bytes)})` : ""}.`;
  }

  function freed(model, end, n) {
    if (end.memory_before_gib == null || end.memory_after_gib == null) return null;
    const gpu = model.status.on_gpu;
    const rest = gpu ? "; the rest is the CUDA context, freed when the server ends" : "";
    return `${gpu ? "GPU memory" : "Memory"} ${n.memory(end.memory_before_gib)} → ${n.memory(end.memory_after_gib)}${rest}.`;
  }

  const by = (end) => (end.by ? ` by ${end.by}` : "");
  const lines = (...all) => all.filter(Boolean);

  function stopped(model, end, n) {
    return { title: `Stopped${by(end)} at step ${n.count(end.step ?? model.fast.step)}.`, lines: lines([saved(model, end, n), freed(model, end, n)].filter(Boolean).join(" ")) };
  }

  function paused(model, end, n) {
    const line = [saved(model, end, n), freed(model, end, n), "Resume goes on from here."].filter(Boolean).join(" ");
    return { title: `Paused${by(end)} at step ${n.count(end.step ?? model.fast.step)}.`, lines: lines(line) };
  }

  function finished(model, end, n) {
    const took = model.clock.y.length ? n.duration(model.worked(model.last(model.clock)) - model.worked(model.began)) : null;
    const best = model.status.best;
    const line = [
      saved(model, end, n),
      best !== null && best !== undefined && `Best held-out loss ${n.loss(best)} at step ${n.count(model.status.best_step)}.`,
      freed(model, end, n),
    ].filter(Boolean).join(" ");
    const early = end.cause ? `: ${end.cause}` : "";
    return { title: `Finished ${n.count(model.fast.step)} steps${took ? ` in ${took}` : ""}${early}.`, lines: lines(line) };
  }

  function lost(model, end, n) {
    const safe = model.status.saved_step ?? 0, gone = Math.max((model.fast.step ?? 0) - safe, 0);
    if (!gone) return "";
    const seconds = model.timeOf(model.fast.step) - model.timeOf(safe);
    return ` Lost: ${n.count(gone)} step${gone === 1 ? "" : "s"}${seconds > 0 ? ` (${n.duration(seconds)})` : ""}.`;
  }

  function safety(model, n) {
    const safe = model.status.saved_step;
    return safe === null ? "No checkpoint was written yet." : `Safe: step ${n.count(safe)}.`;
  }

  function failed(model, end, n) {
    const at = end.t ? `, ${signalbox.clock(end.t)}` : "";
    const step = end.step ?? model.fast.step;
    const where = step ? `Failed at step ${n.count(step)}${at}` : `Failed before the first step${at}`;
    return { title: `${where} · ${model.status.cause ?? "no cause was written"}`, lines: lines(safety(model, n) + lost(model, end, n), freed(model, end, n)) };
  }

  function diverged(model, end, n) {
    return { title: `Stopped: ${model.status.cause ?? "the loss is no number any more."}`, lines: lines(`Last good: ${safety(model, n).replace("Safe: ", "")}`, freed(model, end, n)) };
  }

  function interrupted(model, end, n) {
    const { status, fast } = model, sign = status.t0 + Math.max(model.last(model.clock) || 0, model.lastSignBefore(Infinity) || 0);
    const when = Number.isFinite(sign) ? `; last sign ${signalbox.clock(sign)}` : "";
    const repeated = fast.step - (status.saved_step ?? 0);
    const again = status.saved_step !== null && repeated > 0 ? ` ${n.count(repeated)} step${repeated === 1 ? "" : "s"} will be repeated.` : "";
    return { title: `Cut off at step ${n.count(fast.step)} (the server ended without stopping${when}).`, lines: lines(safety(model, n) + again) };
  }

  function report(model, end) {
    const { status, fast } = model;
    return [`run ${status.run_id}: ${fast.state} at step ${fast.step} of ${fast.total}`, `model ${status.model}, ${status.method}, profile ${status.profile}`,
      `data ${(status.data ?? []).join(", ")}`, `device ${status.device}`, `cause ${status.cause}`, "", end.detail ?? ""].join("\n");
  }

  async function copy(text) {
    await navigator.clipboard.writeText(text);
  }

  signalbox.runEnd = runEnd;
})();
