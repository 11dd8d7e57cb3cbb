"""The fixed parts of the Train page: toolbar, first screen, gate, row view, phone bar. Their contents come later.

Plain markup without a single dynamic word; `assets/train.js` fills it from `api/train/state`. Called by
`ui/pages/train.py`.
"""

from __future__ import annotations

TOOLBAR = """
<div class="sb-toolbar" id="train-toolbar">
  <h1 class="sb-hidden">Train</h1>
  <div class="sb-row sb-config">
    <label class="sb-hidden" for="train-config">Config</label>
    <select class="sb-input" id="train-config"></select>
    <button type="button" class="sb-link" id="train-changes" aria-expanded="false"
            aria-controls="train-diff">no changes</button>
  </div>
  <div class="sb-row">
    <button type="button" class="sb-button" id="train-suggest" aria-expanded="false"
            aria-controls="train-suggestions">Suggest settings</button>
    <button type="button" class="sb-button" id="train-save-as" aria-expanded="false"
            aria-controls="train-save">Save as…</button>
    <button type="button" class="sb-button" id="train-revert">Revert</button>
  </div>
  <div class="sb-row sb-finding">
    <label class="sb-hidden" for="train-find">Find a setting</label>
    <input class="sb-input" id="train-find" type="search" placeholder="Find a setting" autocomplete="off">
    <div class="sb-segments" role="group" aria-label="How many settings are shown">
      <button type="button" data-view="basic" aria-pressed="true">Basic</button>
      <button type="button" data-view="all" aria-pressed="false">All</button>
    </div>
  </div>
</div>
<p class="sb-note sb-tone-bad" id="train-base-problem" role="alert" hidden></p>
<section class="sb-panel sb-drawer" id="train-diff" aria-label="Changes" hidden></section>
<section class="sb-panel sb-drawer" id="train-suggestions" aria-label="Suggested settings" hidden></section>
<section class="sb-panel sb-drawer" id="train-save" aria-label="Save as" hidden>
  <form class="sb-row" id="train-save-form">
    <label for="train-save-name">Name</label>
    <input class="sb-input" id="train-save-name" maxlength="64" autocomplete="off" spellcheck="false">
    <button type="submit" class="sb-button sb-primary">Save</button>
    <button type="button" class="sb-button" data-closes="train-save">Cancel</button>
  </form>
  <p class="sb-message" id="train-save-message" role="status"></p>
  <div id="train-backups"></div>
</section>
<p class="sb-help" id="train-said" role="status"></p>
"""

FIRST = """
<section class="sb-panel sb-first" id="train-first" hidden aria-labelledby="train-first-title">
  <h2 class="sb-title" id="train-first-title">Nothing here yet.</h2>
  <p>A small model and sample data are made on this machine, and a run is started with them.
     Nothing is downloaded.</p>
  <p><button type="button" class="sb-button sb-primary" id="train-try">Try it now: small model, sample data,
     about 1 min</button></p>
  <div class="sb-bar" id="train-try-bar" hidden><i></i></div>
  <p id="train-try-said" role="status"></p>
  <p class="sb-row">or <a class="sb-button" href="models">1 Choose a model</a>
     <a class="sb-button" href="data">2 Add your data</a>
     <button type="button" class="sb-link" id="train-show-form">Show the form</button></p>
</section>
"""

GATE = """
<section class="sb-panel" id="gate" aria-labelledby="gate-title">
  <h2 class="sb-section" id="gate-title">Ready to start?</h2>
  <div id="gate-head" role="status"></div>
  <div id="gate-lines"></div>
  <div id="gate-fit"></div>
  <div id="gate-plan"></div>
  <div class="sb-naming">
    <div><label for="train-name">Name</label>
      <input class="sb-input" id="train-name" maxlength="120" autocomplete="off"></div>
    <div><label for="train-why">Why</label>
      <input class="sb-input" id="train-why" maxlength="400" placeholder="optional" autocomplete="off"></div>
  </div>
  <p class="sb-message" id="gate-message" role="alert"></p>
  <div class="sb-row sb-go">
    <button type="button" class="sb-button" id="train-smoke">Smoke test</button>
    <button type="button" class="sb-button sb-primary" id="train-start" disabled>Start training</button>
  </div>
</section>
"""

VIEW = """
<section class="sb-panel" id="train-view" aria-labelledby="train-view-title">
  <div class="sb-row sb-view-head">
    <h2 class="sb-section" id="train-view-title">What the model will see</h2>
    <div class="sb-segments" role="group" aria-label="What is shown">
      <button type="button" data-pane="row" aria-pressed="true">One row</button>
      <button type="button" data-pane="batch" aria-pressed="false">First batch</button>
    </div>
  </div>
  <div class="sb-stack" id="view-row-pane">
    <div class="sb-row">
      <div class="sb-row sb-stepper">
        <label for="view-row">row</label>
        <button type="button" class="sb-button" id="view-back" aria-label="Previous row">‹</button>
        <input class="sb-input" id="view-row" inputmode="numeric" value="1" size="6" autocomplete="off">
        <button type="button" class="sb-button" id="view-next" aria-label="Next row">›</button>
      </div>
      <div class="sb-segments" role="group" aria-label="How the row is shown">
        <button type="button" data-mode="tokens" aria-pressed="true">Tokens</button>
        <button type="button" data-mode="text" aria-pressed="false">Text</button>
      </div>
    </div>
    <div id="view-profile"></div>
    <div id="view-body" aria-live="polite"></div>
  </div>
  <div class="sb-stack" id="view-batch" hidden>
    <div class="sb-row sb-batch-head">
      <p class="sb-help" id="batch-said" role="status"></p>
      <button type="button" class="sb-button" id="batch-again" hidden>Show it again</button>
    </div>
    <div id="batch-body"></div>
  </div>
</section>
"""

BOTTOM = """
<div class="sb-bottom" id="train-bottom">
  <button type="button" class="sb-button" id="bottom-gate">…</button>
  <button type="button" class="sb-button" id="bottom-smoke">Smoke</button>
  <button type="button" class="sb-button sb-primary" id="bottom-start" disabled>Start</button>
</div>
"""
