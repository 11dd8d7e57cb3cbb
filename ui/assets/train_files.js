// Below "More data": a further dataset and its weight are chosen, and written into the field as a line of it.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const by = (id) => document.getElementById(id);
  const KEY = "data.dataset_paths";

  signalbox.trainFiles = () => {
    const box = by("more-data");
    if (!box) return;
    const choice = box.querySelector("select"), weight = box.querySelector("input"), add = box.querySelector("button"), said = box.querySelector("[role=status]");
    let offered = "";

    document.addEventListener("signalbox:train", ({ detail }) => {
      const choices = detail.choices?.["data.dataset_path"] ?? [];
      const mark = JSON.stringify(choices);
      if (mark === offered) return;
      offered = mark;
      const before = choice.value;
      choice.replaceChildren(...choices.map(([label, value]) => signalbox.el("option", { value, selected: value === before }, label)));
      add.disabled = !choices.length;
    });

    add.addEventListener("click", () => {
      const field = by(`f-${KEY.replaceAll(".", "-")}`)?.querySelector("textarea");
      const figure = weight.value.trim().replace(",", ".") || "1";
      if (!field || !choice.value) return;
      if (!(Number(figure) > 0 && Number(figure) <= 100)) return signalbox.say(said, "A weight is a number over 0, at most 100: 0.5 shows half of the rows an epoch.");
      signalbox.say(said, "");
      const line = Number(figure) === 1 ? choice.value : `${choice.value} * ${figure}`;
      field.value = [field.value.trimEnd(), line].filter(Boolean).join("\n");
      // both Gradio and our own script hear what is typed by this event
      field.dispatchEvent(new Event("input", { bubbles: true }));
    });
  };
})();
