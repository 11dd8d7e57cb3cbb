// Building the page out of text: every word that comes from the server goes through textContent, never through markup.
(() => {
  "use strict";
  const signalbox = (window.signalbox ??= {});
  const TONES = {
    run: ["running", "preparing", "pausing", "stopping", "pass"],
    warn: ["interrupted", "paused", "warning"],
    bad: ["failed", "diverged", "problem"],
  };

  /** An element: `el("p.sb-help", {title: "…", onclick: f}, "text", child, …)`; null children are left out. */
  function el(what, ...rest) {
    const [tag, ...classes] = what.split(".");
    const node = document.createElement(tag);
    node.className = classes.join(" ");
    const plain = (item) => item !== null && typeof item === "object" && !(item instanceof Node) && !Array.isArray(item);
    const settings = plain(rest[0]) ? rest.shift() : {};
    for (const [name, value] of Object.entries(settings)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "data") Object.assign(node.dataset, value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...rest.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  /** The 12 px sign of a state, out of the header's sprite. */
  function glyph(name) {
    const size = { class: "sb-glyph", width: 12, height: 12, "aria-hidden": "true" };
    return svg("svg", size, svg("use", { href: `#g-${name}` }));
  }

  function tone(name) {
    return Object.keys(TONES).find((key) => TONES[key].includes(name)) ?? "rest";
  }

  /** Sign, word and colour of a state. */
  function chip(name, word = name) {
    return el(`span.sb-state.sb-tone-${tone(name)}.sb-is-${name}`, glyph(name), el("span", word));
  }

  /** A button; `kind` is "", "primary" or "danger". */
  function button(text, onclick, kind = "", settings = {}) {
    return el(`button.sb-button${kind ? `.sb-${kind}` : ""}`, { type: "button", onclick, ...settings }, text);
  }

  /** Send JSON and return the answer; throws an Error with the server's sentence when it refuses. */
  async function send(address, body) {
    const reply = await fetch(address, {
      method: body === undefined ? "GET" : "POST",
      headers: body === undefined ? {} : { "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    const answer = await reply.json().catch(() => ({}));
    if (!reply.ok) throw new Error(answer.error ?? `The server answered ${reply.status}.`);
    return answer;
  }

  /** Put `text` into `node` only when it differs, so that a selection and a screen reader are left alone. */
  function say(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }

  Object.assign(signalbox, { el, svg, glyph, tone, chip, button, send, say });
})();
