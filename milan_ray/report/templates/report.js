"use strict";
// Search over all layers (index) and sorting and filtering within one (layer pages). Data arrives in scripts that call
// window.milan, because a page opened from disk may load scripts but nothing else. Text from the data is only ever set
// as text; the cards' HTML was escaped where it was written.
(() => {
  const $ = (selector) => document.querySelector(selector);
  const layers = [];
  const cards = new Map();
  window.milan = {
    layer: (layer) => layers.push(layer),
    cards: (page, html) => cards.set(page, html),
  };

  const scripts = new Map();
  const load = (source) => {
    if (!scripts.has(source)) {
      scripts.set(source, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.onload = resolve;
        script.onerror = () => reject(new Error(`cannot read ${source}`));
        script.src = source;
        document.head.append(script);
      }));
    }
    return scripts.get(source);
  };

  const say = (text) => { $("#status").textContent = text; };
  const complain = (error) => { say(error.message); throw error; };
  const count = (n) => `${n.toLocaleString("en")} unit${n === 1 ? "" : "s"}`;
  const number = (value) => Number(value.toPrecision(4)).toString().replace("-", "−");

  const wordsOf = (text) => text.toLowerCase().split(/[^\p{L}\p{N}]+/u).filter(Boolean);

  const singulars = (word) => [[/(..)ies$/, "$1y"], [/([sxz]|[cs]h)es$/, "$1"], [/(..[^s])s$/, "$1"]]
    .filter(([ending]) => ending.test(word)).map(([ending, rest]) => word.replace(ending, rest));

  // Every word must begin a word of one of the descriptions, or be a plural of one, or the unit's number.
  const matcher = (text) => {
    const words = wordsOf(text).map((word) => [` ${word}`, ...singulars(word).map((one) => ` ${one} `)]);
    return (unit) => {
      unit.text ??= ` ${unit.unit} ${wordsOf(unit.labels.join(" ")).join(" ")} `;
      return words.every((word) => word.some((form) => unit.text.includes(form)));
    };
  };

  // Units without a value come last in either direction.
  const compare = (key, sign) => (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  };
  const score = (unit) => unit.scores[0] ?? null;
  const orders = {
    "unit": () => 0,
    "score-down": compare(score, -1),
    "score-up": compare(score, 1),
    "activation-down": compare((unit) => unit.activation, -1),
    "activation-up": compare((unit) => unit.activation, 1),
  };

  const element = (name, properties, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  const startIndex = () => {
    const STEP = 60;
    const sources = Array.from(document.querySelectorAll("[data-units]"), (row) => row.dataset.units);
    const [results, list, button] = [$("#results"), $("#results ol"), $("#results button")];
    let found = [];

    const result = ([layer, unit]) => {
      const link = element("a", { href: `${layer.href}${unit.page}#unit-${unit.unit}` });
      if (unit.image !== null) {
        const picture = element("span", { className: "picture" },
          element("img", { src: unit.image, alt: "", loading: "lazy" }),
          element("img", { src: `${layer.href}masks/${unit.unit}.png`, alt: "", loading: "lazy", className: "mask" }));
        picture.style.aspectRatio = `${layer.shape[1]}/${layer.shape[0]}`;
        picture.lastChild.style.objectPosition = "0 0";
        link.append(picture);
      }
      const where = `${layer.model} · ${layer.layer} · unit ${unit.unit}`;
      const value = score(unit) === null ? "" : ` · score ${number(score(unit))}`;
      const labels = [...new Set(unit.labels.filter(Boolean))].join(" / ");
      link.append(element("span", {}, labels, element("small", {}, where + value)));
      return element("li", {}, link);
    };
    const more = () => {
      const shown = list.children.length;
      list.append(...found.slice(shown, shown + STEP).map(result));
      button.hidden = list.children.length >= found.length;
    };
    const search = async () => {
      const [text, href] = [$("#search").value.trim(), $("#layer").value];
      results.hidden = !text && !href;
      if (results.hidden) return say("");
      await Promise.all(sources.map(load)).catch(complain);
      if (text !== $("#search").value.trim() || href !== $("#layer").value) return; // typed on meanwhile
      const matches = matcher(text);
      found = layers.filter((layer) => !href || layer.href === href)
        .flatMap((layer) => layer.units.filter(matches).map((unit) => [layer, unit]))
        .sort((a, b) => orders["score-down"](a[1], b[1]));
      list.replaceChildren();
      more();
      say(`${count(found.length)} found`);
    };
    $("#search").addEventListener("input", search);
    $("#layer").addEventListener("change", search);
    button.addEventListener("click", more);
    search(); // a browser may have kept the words of an earlier visit
  };

  const startLayer = () => {
    const STEP = 20;
    const [grid, end, units] = [$("#content"), $("#more"), layers[0].units];
    let order = units;
    let shown = Number(grid.dataset.shown); // the page's own cards; scrolling adds those of later pages
    let round = 0;
    let busy = false;

    const more = async () => {
      if (busy || shown >= order.length) return;
      busy = true;
      const started = round;
      const batch = order.slice(shown, shown + STEP);
      await Promise.all(batch.map((unit) => load(`${unit.page}.js`))).catch(complain);
      busy = false;
      if (started === round) {
        const template = document.createElement("template");
        template.innerHTML = batch.map((unit) => cards.get(unit.page)[unit.place]).join("");
        grid.append(template.content);
        shown += batch.length;
      }
      watcher.unobserve(end); // observing anew reports again when the end is still in sight
      watcher.observe(end);
    };
    const watcher = new IntersectionObserver((seen) => { if (seen.at(-1).isIntersecting) more(); }, { rootMargin: "800px" });
    const arrange = () => {
      order = units.filter(matcher($("#words").value)).sort(orders[$("#sort").value]);
      shown = 0;
      round += 1;
      document.querySelectorAll(".pager").forEach((pager) => { pager.hidden = true; }); // pages are in unit order
      grid.replaceChildren();
      say(order.length === units.length ? "" : `${order.length} of ${count(units.length)}`);
      more();
    };
    let page = null;
    let place = 0;
    for (const unit of units) { // where in its page's list the card is
      place = unit.page === page ? place + 1 : 0;
      page = unit.page;
      unit.place = place;
    }
    $("#words").addEventListener("input", arrange);
    $("#sort").addEventListener("change", arrange);
    watcher.observe(end);
    if ($("#words").value || $("#sort").value !== "unit") arrange();
  };

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll(".script").forEach((control) => { control.hidden = false; });
    document.querySelectorAll(".toolbar").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/^(INPUT|SELECT)$/.test(event.target.tagName)) {
        event.preventDefault();
        $("input[type=search]").focus();
      }
    });
    if ($("#results")) startIndex(); else startLayer();
  });
})();
