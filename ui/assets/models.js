// The Models page: the shelf of model folders, the download by id (hub.js) and the starter model.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});

  signalbox.modelsPage = (element, props) => {
    const { el, Shelf } = signalbox;
    const root = element.querySelector(".sb-shelf");
    const places = [props.folder, ...props.roots];
    root.append(
      el("div", el("h1.sb-title", "Models"),
        el("p.sb-help", "Model folders in ", places.map((place, at) => [at ? ", " : "", el("code", place)]).flat(),
          ". Copy a folder there, or start Signalbox with --model-root and a folder of yours.")));
    const shelf = new Shelf(root, {
      kind: "models",
      columns: ["#Size", "Where"],
      onItems: checkNew(() => shelf.soon()),
      empty: () => el("p", "No models yet. Copy a model folder into ", el("code", props.folder), ", download one by its id, or make the starter model above."),
      more: () => [
        el("h3", "Every weight"),
        el("p.sb-help", "The check above reads names, shapes and headers, no numbers. This one reads all weights and looks for values that are not numbers; it takes as long as reading the files does."),
        el("div.sb-row", shelf.action("Read every weight", "check", { deep: true })),
      ],
    });
    const arrived = async (folder) => {
      await shelf.soon();
      const item = shelf.items.find((one) => one.name === folder);
      if (item) shelf.choose(item.id);
    };
    root.firstChild.after(signalbox.hubPanel(arrived), starter(shelf));
  };

  /** Headers are read in a moment and shapes compared one model at a time, so models that were never looked at are checked without being asked. */
  function checkNew(look) {
    const asked = new Set();
    return (items) => {
      for (const item of items) {
        if (item.sign !== "not-run" || asked.has(item.id)) continue;
        asked.add(item.id);
        // a viewer may not start checks: the list then says "not checked", which is true
        signalbox.send(`api/models/${encodeURIComponent(item.id)}/check`, {}).then(look, () => {});
      }
    };
  }

  function starter(shelf) {
    const { el, button, say } = signalbox;
    const hint = "A very small model and sample conversations, written here in under a minute. Nothing is downloaded.";
    const said = el("span.sb-help.sb-upload-said", { role: "status" }, hint);
    const make = button("Make the starter model", async () => {
      try {
        await signalbox.send("api/models/starter", {});
        watch(true);
      } catch (error) {
        fail(error.message);
      }
    });
    const fail = (text) => {
      said.className = "sb-upload-said sb-tone-bad";
      say(said, text);
    };

    async function watch(wasAsked) {
      const { state, error } = await signalbox.send("api/models/starter");
      make.disabled = state === "running";
      if (wasAsked || state === "running") said.className = "sb-upload-said";
      if (state === "running") {
        say(said, "Making the starter model and its data.");
        setTimeout(() => watch(true), 700);
      } else if (wasAsked) {
        if (state === "done") say(said, "Made: a starter model here, and sample data on the Data page.");
        else fail(error ?? "It was not finished.");
        shelf.soon();
      }
    }

    watch(false);
    return el("section.sb-panel.sb-upload", { "aria-label": "Starter model" },
      el("div.sb-row", make, said));
  }
})();
