// Below the webhook's field: Send test, and how the last message went. The owner's alone; others are told so.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const by = (id) => document.getElementById(id);

  /** `fields` sends what was typed first, so that the test goes to the address that stands in the field. */
  signalbox.trainNotify = (root, fields) => {
    const box = by("notify-test"), button = box?.querySelector("button"), said = by("notify-said");
    if (!box) return;

    function show(last) {
      const kind = { ended: "a run ended", failed: "a run failed", stalled: "a run stood still", link: "the link changed", test: "test" };
      said.className = last && !last.ok ? "sb-message" : "sb-help";
      if (!last) return signalbox.say(said, "Nothing was sent yet.");
      const when = signalbox.numbers.when(last.at, Date.now() / 1000);
      signalbox.say(said, `${last.ok ? "Sent" : "Not sent"} (${kind[last.kind] ?? last.kind}), ${when}: ${last.text}`);
    }

    async function ask() {
      try {
        show((await signalbox.send("api/notify")).last);
      } catch (error) {
        button.disabled = true;
        said.className = "sb-help";
        signalbox.say(said, error.message);
      }
    }

    async function test() {
      button.disabled = true;
      said.className = "sb-help";
      signalbox.say(said, "Sending, at most 10 s …");
      try {
        await fields.flush();
        show((await signalbox.send("api/notify/test", {})).last);
      } catch (error) {
        said.className = "sb-message";
        signalbox.say(said, error.message);
      }
      button.disabled = false;
    }

    button.addEventListener("click", test);
    ask();
  };
})();
