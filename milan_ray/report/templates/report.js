"use strict";
// What all pages share: data, words, elements, pictures. Data arrive in scripts that call window.milan, because a page
// opened from disk may load scripts but nothing else. Text from data is only ever set as text, never as HTML.
window.milan = (() => {
  const root = document.documentElement.dataset.root;
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

  // -- data ----------------------------------------------------------------------------------------------------------

  const scripts = new Map();
  const load = (source) => {
    if (!scripts.has(source)) {
      scripts.set(source, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.onload = () => { script.remove(); resolve(); };
        script.onerror = () => { scripts.delete(source); reject(new Error(`cannot read ${source}`)); };
        script.src = root + source;
        document.head.append(script);
      }));
    }
    return scripts.get(source);
  };

  const layers = new Map();
  const cards = new Map();
  const names = new Map();
  const layer = (data) => {
    data.places = new Map(data.units.map((unit, place) => [unit, place]));
    layers.set(data.href, data);
  };
  const layerAt = async (href) => {
    if (!layers.has(href)) await load(`${href}units.js`);
    return layers.get(href);
  };
  // All that is known of a unit: a promise, of null where the layer has no such unit.
  const cardOf = async (of, unit) => {
    const place = of.places.get(unit);
    if (place === undefined) return null;
    const [number, offset] = [Math.floor(place / of.page), place % of.page];
    const key = `${of.href}cards/${number}.js`;
    if (!cards.has(key)) await load(key);
    return cards.get(key)[offset];
  };
  const FOLDER = 1000; // images per folder
  const namesOf = async (of, image) => {
    if (!of.named) return null;
    const folder = `${of.images}${Math.floor(image / FOLDER)}/`;
    if (!names.has(folder)) await load(`${folder}names.js`);
    return names.get(folder)[image] ?? null;
  };

  // -- figures and words ---------------------------------------------------------------------------------------------

  const number = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString().replace("-", "−"));
  const count = (n, noun = "unit") => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

  const wordsOf = (text) => text.toLowerCase().split(/[^\p{L}\p{N}]+/u).filter(Boolean);
  const singulars = (word) => [[/(..)ies$/, "$1y"], [/([sxz]|[cs]h)es$/, "$1"], [/(..[^s])s$/, "$1"]]
    .filter(([ending]) => ending.test(word)).map(([ending, rest]) => word.replace(ending, rest));
  // Tells of a text (its words between blanks) whether every word of the query begins one of its words, or is a plural of one.
  const matcher = (query) => {
    const words = wordsOf(query).map((word) => [` ${word}`, ...singulars(word).map((one) => ` ${one} `)]);
    return (text) => words.every((forms) => forms.some((form) => text.includes(form)));
  };
  const spoken = (...texts) => ` ${wordsOf(texts.join(" ")).join(" ")} `;

  // -- elements ------------------------------------------------------------------------------------------------------

  // element("p.other.small", { title: "…" }, "text", child, null): classes behind the name, children that are null left out.
  const element = (kind, properties = {}, ...children) => {
    const [name, ...classes] = kind.split(".");
    const made = Object.assign(document.createElement(name), properties);
    if (classes.length) made.className = classes.join(" ");
    made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  };
  const link = (href, ...children) => element("a", { href: root + href }, ...children);
  const facts = (pairs) => element("dl.facts", {}, ...pairs.filter(Boolean).map(([name, value, kind = ""]) =>
    element("div", { className: kind }, element("dt", {}, name), element("dd", {}, value))));
  const table = (heads, rows, kind = "") => element("div.wide", {}, element("table", { className: kind },
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...rows.map(([first, ...rest]) => element("tr", {},
      element("th", { scope: "row" }, first), ...rest.map((cell) => element("td", {}, cell)))))));

  // An image under the veil of its mask; `rank`: which of the `of_ranks` masks of the unit's strip.
  const picture = (of, image, unit, rank, ranks, alt) => {
    const folder = `${root}${of.images}${Math.floor(image / FOLDER)}/`;
    const made = element("span.picture", {},
      element("img", { src: `${folder}${image}.jpg`, alt, loading: "lazy" }),
      element("img.mask", { src: `${root}${of.masks}${unit}.png`, alt: "", loading: "lazy" }));
    made.style.aspectRatio = `${of.shape[1]}/${of.shape[0]}`;
    made.lastChild.style.objectPosition = `0 ${100 * rank / Math.max(ranks - 1, 1)}%`;
    return made;
  };
  const exemplars = (of, card, most = Infinity) => {
    if (!card.images.length) return element("p.empty", {}, "No exemplars: the unit has no finite activation on any image.");
    return element("ol.exemplars", {}, ...card.images.slice(0, most).map((image, rank) => {
      const value = card.activations[rank];
      const made = picture(of, image, card.unit, rank, card.images.length, `image ${image}`);
      return element("li", {}, made, element("span.activation", { title: `activation on image ${image}` }, number(value)));
    }));
  };
  const unitLink = (of, unit) => `${of.href}index.html#unit-${unit}`;
  const labelOf = (of, place, by = 0) => (of.labels[by]?.[place] ?? -1) < 0 ? null : of.texts[of.labels[by][place]];

  // A description as it is shown. Text that says nothing is said as such: no unit looks as if it had not been described.
  const shownText = (text) => !text.trim() ? "(empty description)" : /^nothing\W*$/i.test(text.trim()) ? `${text} (says the description)` : text;

  // A unit in a list: its strongest exemplar, what is said of it, where it is.
  const item = (of, place, note, labels = of.labelers.map((_, by) => labelOf(of, place, by))) => {
    const [unit, image] = [of.units[place], of.first[place]];
    const said = [...new Set(labels.filter((text) => text !== null).map(shownText))].join(" / ");
    return element("li", {}, link(unitLink(of, unit),
      image === null ? null : strongest(of, place),
      element("span", {}, said, element("small", {}, note))));
  };
  // Which part of the strip is the strongest exemplar's needs no count: it is the first.
  const strongest = (of, place) => picture(of, of.first[place], of.units[place], 0, 1, "");

  const say = (text) => { const status = $("#status"); if (status) status.textContent = text; };
  const complain = (error) => { say(error.message); throw error; };

  // -- pages of a list -----------------------------------------------------------------------------------------------

  // Keeps all pagers of the document in step; `go` is called with the page (from 0) that was asked for.
  const pagers = (go) => {
    const all = $$(".pager");
    let [page, pages] = [0, 1];
    const ask = (to) => { if (to >= 0 && to < pages && to !== page) go(to); };
    for (const pager of all) {
      $$("button", pager).forEach((button) => button.addEventListener("click", () => ask(page + Number(button.dataset.step))));
      $("input", pager).addEventListener("change", (event) => {
        const to = Math.min(Math.max(Math.trunc(Number(event.target.value)) || 1, 1), pages) - 1;
        event.target.value = to + 1;
        ask(to);
      });
    }
    return (now, items, size) => {
      [page, pages] = [now, Math.max(1, Math.ceil(items / size))];
      for (const pager of all) {
        pager.hidden = pages === 1;
        Object.assign($("input", pager), { value: page + 1, max: pages });
        $("span", pager).textContent = `of ${pages.toLocaleString("en")}`;
        const [back, on] = $$("button", pager);
        [back.disabled, on.disabled] = [page === 0, page === pages - 1];
      }
    };
  };

  // -- masks ---------------------------------------------------------------------------------------------------------

  // The choice holds for all pages, where the browser lets a page opened from disk remember.
  const remember = (key, value) => {
    try {
      if (value !== undefined) localStorage.setItem(key, value);
      return localStorage.getItem(key);
    } catch {
      return null;
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    const choices = $$("input[name=masks]");
    const kept = choices.find((choice) => choice.value === remember("milan-masks"));
    if (kept) kept.checked = true;
    choices.forEach((choice) => choice.addEventListener("change", () => remember("milan-masks", choice.value)));
    $$("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.ctrlKey && !event.metaKey && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      const search = $("input[type=search]");
      if (search?.offsetParent) {
        event.preventDefault();
        search.focus();
      }
    }
  });

  return {
    layer,
    cards: (href, page, found) => cards.set(`${href}cards/${page}.js`, found),
    names: (folder, found) => names.set(folder, found),
    $, $$, load, layerAt, cardOf, namesOf, number, count, matcher, spoken, wordsOf, element, link, facts, table, exemplars,
    item, strongest, unitLink, labelOf, shownText, say, complain, pagers,
  };
})();
