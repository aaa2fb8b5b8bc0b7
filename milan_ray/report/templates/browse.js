"use strict";
// Search, filter, sort and pages: over all layers on the overview, over one on its page. What is chosen stands behind the
// # of the address, so that going back, reloading and sharing a place all work without a server.
(() => {
  const { $, $$, layerAt, cardOf, number, count, matcher, spoken, element, facts, exemplars, item, unitLink, link, labelOf, shownText, say, complain, pagers } = milan;
  const NAMES = ["words", "layer", "by", "verdict", "sort", "order", "column", "low", "high"];

  // The words of a unit, its number among them: by one labeler, or by all.
  const textsOf = (layer, by) => {
    layer.spoken ??= new Map();
    if (!layer.spoken.has(by)) {
      const which = by ? [layer.labelers.indexOf(by)] : layer.labelers.map((_, place) => place);
      const said = layer.texts.map((text) => spoken(text));
      layer.spoken.set(by, layer.units.map((unit, place) =>
        which.reduce((text, one) => (layer.labels[one][place] < 0 ? text : text + said[layer.labels[one][place]]), ` ${unit} `)));
    }
    return layer.spoken.get(by);
  };

  const limit = (text) => (text === "" ? null : Number(text));

  // [layer, place] of the units that fit, in the order asked for; units without the figure come last in either.
  const select = (layers, state) => {
    const matches = matcher(state.words);
    const [low, high] = [limit(state.low), limit(state.high)];
    const found = [];
    for (const layer of layers) {
      if (state.layer && layer.href !== state.layer) continue;
      const texts = textsOf(layer, state.by);
      const values = low === null && high === null ? null : layer.columns[state.column]?.values ?? [];
      // A verdict is a number in a column: "3 world/truth milan verdict".
      const [, wanted, key] = /^(\d) (.*)$/.exec(state.verdict) ?? [];
      const given = key ? layer.columns[key]?.values ?? [] : null;
      for (let place = 0; place < layer.units.length; place += 1) {
        if (given && given[place] !== Number(wanted)) continue;
        if (values) {
          const value = values[place] ?? null;
          if (value === null || (low !== null && value < low) || (high !== null && value > high)) continue;
        }
        if (matches(texts[place])) found.push([layer, place]);
      }
    }
    if (state.sort) {
      const sign = state.order === "up" ? 1 : -1;
      const value = ([layer, place]) => layer.columns[state.sort]?.values[place] ?? null;
      const keyed = found.map((unit) => [value(unit), unit]);
      keyed.sort(([x], [y]) => (x === null || y === null ? (x === null) - (y === null) : sign * (x - y)));
      return keyed.map(([, unit]) => unit);
    }
    return found;
  };

  const headline = (layer, state) => Math.max(0, layer.labelers.indexOf(state.by));

  const cardElement = (layer, card, state) => {
    const by = headline(layer, state);
    const label = card.labels[by] ?? null;
    const others = layer.labelers.map((name, place) => [name, card.labels[place]]).filter(([, one], place) => one && place !== by);
    const shown = state.sort && !["activation", "level", `score ${layer.labelers[by]}`].includes(state.sort) ? layer.columns[state.sort] : null;
    const href = unitLink(layer, card.unit);
    return element("article.card", { ariaLabel: `unit ${card.unit}` },
      element("header", {},
        element("h2", {}, label ? element("span.description", {}, shownText(label.text)) : null, link(href, `unit ${card.unit}`)),
        facts([
          label && [label.lam === null ? "score" : "wPMI", number(label.score)],
          label && label.logp_d_given_e !== null && ["log p(d|E)", number(label.logp_d_given_e)],
          label && label.logp_d !== null && ["log p(d)", number(label.logp_d)],
          label && label.lam !== null && ["λ", number(label.lam)],
          card.level && ["level η", number(card.level[0])],
          card.level && card.level[2] && ["NaN or infinite activations", number(card.level[2]), "warning"],
          card.doubt && [...card.doubt, "warning"],
          ...card.verdicts.filter((one) => one.labeler === layer.labelers[by]).map((one) => [`verdict (${one.judge})`, one.verdict, one.verdict === "supported" ? "" : "warning"]),
          shown && [shown.name, number(shown.values[layer.places.get(card.unit)])],
        ])),
      exemplars(layer, card),
      ...others.map(([name, one]) => element("p.other", {}, element("span.who", {}, name), " ", shownText(one.text), " ", element("span.number", {}, number(one.score)))),
      card.annotations.length ? element("ul.annotations", { ariaLabel: "Annotations" },
        ...card.annotations.map(([text, who, source]) => element("li", { title: `${who}, ${source}` }, text))) : null);
  };

  const start = () => {
    const form = $("[data-browse]");
    const [list, results] = [$("#list"), $("#results")];
    const place = list ?? results;
    const size = Number(place.dataset.pageSize);
    const grid = $(list ? ".cards" : ".units", place);
    const sources = list ? [list.dataset.layer] : $$("[data-layer]").map((row) => row.dataset.layer);
    const controls = NAMES.map((name) => form.elements[name]).filter(Boolean);
    const [clear, histogram] = [$("button[type=reset]", form), $(".histogram", form)];
    const blank = Object.fromEntries(NAMES.map((name) => [name, form.elements[name]?.value ?? ""]));
    let own = null; // the address that this page has set itself
    let round = 0;
    let page = 0;

    const state = () => ({ ...blank, ...Object.fromEntries(controls.map((control) => [control.name, control.value.trim()])) });
    const changed = (now) => NAMES.filter((name) => now[name] !== blank[name] && (name !== "column" || now.low || now.high));
    const address = (now) => {
      const parts = new URLSearchParams(changed(now).map((name) => [name, now[name]]));
      if (page) parts.set("page", page + 1);
      return `#${parts}`;
    };
    const update = pagers((to) => {
      page = to;
      own = address(state());
      location.hash = own; // a new entry: going back leads to the page before
      show(true);
    });

    const draw = (layers, now) => {
      const values = layers.flatMap((layer) => layer.columns[now.column]?.values ?? []).filter((value) => value !== null);
      histogram.toggleAttribute("hidden", values.length < 2);
      if (values.length < 2) return;
      const BARS = 24;
      const [least, most] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
      const bars = new Array(BARS).fill(0);
      values.forEach((value) => { bars[Math.min(BARS - 1, Math.floor((value - least) / (most - least || 1) * BARS))] += 1; });
      const top = Math.max(...bars);
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", bars.map((bar, n) => `M${n * 48 / BARS} 20v${-Math.ceil(20 * bar / top)}h1.7V20z`).join(""));
      histogram.replaceChildren(path);
      histogram.setAttribute("aria-label", `distribution from ${number(least)} to ${number(most)}`);
      [form.elements.low.placeholder, form.elements.high.placeholder] = [number(least), number(most)];
    };

    const show = async (scroll = false) => {
      round += 1;
      const [mine, now] = [round, state()];
      clear.hidden = !changed(now).length;
      form.elements.order.hidden = !now.sort; // unit numbers only go up
      if (results) {
        results.hidden = !changed(now).length;
        if (results.hidden) { update(0, 0, size); return say(""); }
      }
      const layers = await Promise.all(sources.map(layerAt)).catch(complain);
      if (mine !== round) return; // something else was asked for meanwhile
      if (histogram) draw(now.layer ? layers.filter((layer) => layer.href === now.layer) : layers, now);
      const found = select(layers, now);
      const all = layers.reduce((sum, layer) => sum + layer.units.length, 0);
      page = Math.min(page, Math.max(0, Math.ceil(found.length / size) - 1));
      const part = found.slice(page * size, (page + 1) * size);
      const made = list
        ? (await Promise.all(part.map(([layer, at]) => cardOf(layer, layer.units[at]))).catch(complain)).map((card) => cardElement(layers[0], card, now))
        : part.map(([layer, at]) => {
          const value = layer.columns[now.sort || `score ${layer.labelers[headline(layer, now)]}`];
          const figure = value ? ` · ${value.name} ${number(value.values[at])}` : "";
          const labels = now.by ? [labelOf(layer, at, headline(layer, now))] : undefined;
          return item(layer, at, `${layer.model} · ${layer.layer} · unit ${layer.units[at]}${figure}`, labels);
        });
      if (mine !== round) return;
      grid.replaceChildren(...made);
      update(page, found.length, size);
      say(results ? `${count(found.length)} found` : found.length === all ? count(all) : `${found.length.toLocaleString("en")} of ${count(all)}`);
      if (scroll) place.scrollIntoView();
    };

    const change = () => {
      page = 0;
      own = address(state());
      location.replace(own);
      show();
    };
    // From the address to the controls; a unit's page is not ours.
    const adopt = () => {
      const here = decodeURIComponent(location.hash);
      if (/^#unit-\d+$/.test(here) || here === "#content") return;
      const parts = new URLSearchParams(location.hash.slice(1));
      controls.forEach((control) => {
        const value = parts.get(control.name) ?? blank[control.name];
        if (control.value !== value) control.value = value;
      });
      page = Math.max(0, (Number(parts.get("page")) || 1) - 1);
      show();
    };
    controls.forEach((control) => control.addEventListener(control.tagName === "SELECT" ? "change" : "input", change));
    form.addEventListener("reset", (event) => {
      event.preventDefault(); // masks stay as they are
      controls.forEach((control) => { control.value = blank[control.name]; });
      change();
    });
    addEventListener("hashchange", () => { if (location.hash !== own) { own = null; adopt(); } });
    adopt();

    // For a unit's page: the order in which the list shows its neighbours.
    milan.order = async () => select(await Promise.all(sources.map(layerAt)), state());
  };
  document.addEventListener("DOMContentLoaded", start);
})();
