"use strict";
// Two networks unit by unit: what each says of its unit, beside its exemplars.
(() => {
  const { $, layerAt, cardOf, count, matcher, spoken, element, link, exemplars, unitLink, say, complain, pagers } = milan;
  const SIZE = 20;
  const EXEMPLARS = 5;
  let data = null;
  milan.changes = (changes) => { data = changes; };

  const marked = (text, words, kind) => {
    const parts = text.split(/([\p{L}\p{N}]+)/u);
    // A word stands for all its forms: its beginning suffices to find it.
    const hit = (part) => words.some((word) => part.toLowerCase().startsWith(word) || (part.length > 2 && word.startsWith(part.toLowerCase())));
    return parts.map((part) => (part && /[\p{L}\p{N}]/u.test(part) && hit(part) ? element(`mark.${kind}`, {}, part) : part));
  };

  const side = async (model, href, unit, text, words, kind) => {
    const layer = href ? await layerAt(href) : null;
    const card = layer ? await cardOf(layer, unit) : null;
    const title = element("span.description", {}, ...marked(text, words, kind));
    return element("div.side", {},
      element("p", {}, element("span.who", {}, model), " ", card ? link(unitLink(layer, unit), title) : title),
      card ? exemplars(layer, card, EXEMPLARS) : null);
  };

  const pair = async ([place, unit, one, other, gained, lost]) => element("li.card", {},
    element("h3", {}, `${data.layers[place]} · unit ${unit}`, " ",
      ...lost.map((word) => element("mark.lost", { title: "lost" }, `− ${word}`)),
      ...gained.map((word) => element("mark.gained", { title: "gained" }, `+ ${word}`))),
    element("div.sides", {},
      await side(data.models[0], data.sides[0][place], unit, one, lost, "lost"),
      await side(data.models[1], data.sides[1][place], unit, other, gained, "gained")));

  const start = () => {
    const form = $("form.toolbar");
    if (!form) return;
    const texts = data.rows.map(([, unit, one, other]) => spoken(String(unit), one, other));
    let page = 0;
    let round = 0;
    const update = pagers((to) => { page = to; show(true); });
    const show = async (scroll = false) => {
      round += 1;
      const mine = round;
      const matches = matcher(form.elements.words.value);
      const layer = form.elements.layer.value;
      const found = data.rows.filter((row, n) => (!layer || row[0] === Number(layer)) && matches(texts[n]));
      const made = await Promise.all(found.slice(page * SIZE, (page + 1) * SIZE).map(pair)).catch(complain);
      if (mine !== round) return;
      $(".pairs").replaceChildren(...made);
      update(page, found.length, SIZE);
      say(found.length === data.rows.length ? count(found.length) : `${found.length.toLocaleString("en")} of ${count(data.rows.length)}`);
      if (scroll) form.scrollIntoView();
    };
    for (const control of [form.elements.words, form.elements.layer]) {
      control.addEventListener(control.tagName === "SELECT" ? "change" : "input", () => { page = 0; show(); });
    }
    show();
  };
  document.addEventListener("DOMContentLoaded", start);
})();
