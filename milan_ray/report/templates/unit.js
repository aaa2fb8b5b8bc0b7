"use strict";
// The page of one unit: its layer's page with #unit-12 behind it.
(() => {
  const { $, $$, layerAt, cardOf, namesOf, number, count, spoken, wordsOf, element, link, facts, table, exemplars, item, labelOf, shownText, unitLink, complain } = milan;
  const NEAREST = 8;

  const section = (title, ...children) => element("section", {}, element("h3", {}, title), ...children);

  // What is said of a unit, candidate by candidate.
  const candidates = (name, label) => {
    const wpmi = label.lam !== null;
    const parts = label.best.some(([, , given]) => given !== null);
    const heads = ["description", wpmi ? `wPMI, λ = ${number(label.lam)}` : "score", ...(parts ? ["log p(d|E)", "log p(d)"] : [])];
    return section(`${name}: the ${label.best.length} best`,
      table(heads, label.best.map(([text, ...figures]) => [shownText(text), ...figures.slice(0, heads.length - 1).map(number)])));
  };

  const levelFacts = ([level, positions, nonfinite, exact]) => [
    ["level η", number(level)],
    ["positions", `${positions.toLocaleString("en")}${exact ? "" : ", a sample"}`],
    nonfinite && ["NaN or infinite activations", nonfinite.toLocaleString("en"), "warning"],
  ];

  // What the unit does to the classes, beside two baselines.
  const effects = ({ images, active, factor, random, changes }) => {
    const percent = (value, sign = "") => value === null ? "–" : `${sign && value > 0 ? sign : ""}${number(100 * value)} %`;
    const classes = (found) => element("ul.plain", {}, ...found.map(([name, probability, logit]) =>
      element("li", { title: `logit ${number(logit)}` }, name, " ", element("small", {}, percent(probability, "+")))));
    return section("Effect on the classes",
      table(["change", "moved", "random direction", "unit of like strength", "prediction changes", "gain", "lose"],
        changes.map((one) => [one.change === "amplified" ? `amplified × ${factor}` : one.change, percent(one.moved),
          one.change === "ablated" ? percent(random) : "–", percent(one.peer_moved), percent(one.flipped), classes(one.gained), classes(one.lost)]), "effects"),
      element("p.legend", {}, `Mean changes of probabilities over ${count(images, "image")}; the unit has a value on ${active.toLocaleString("en")} of them, and nothing changes on the others. `
        + "Moved: how much probability went from classes to others. A random direction takes as much off the layer's output; what is not above it is what any change of this size does."));
  };

  // Units that say nearly the same: cosine of the words of two descriptions, rare words weighing more (tf-idf).
  const sayTheSame = (layers, layer, place) => {
    const own = layer.labels[0]?.[place] ?? -1;
    if (own < 0) return [];
    const documents = new Map(); // word → units that say it
    let units = 0;
    const bags = layers.map((one) => {
      const often = new Array(one.texts.length).fill(0);
      one.labels[0].forEach((text) => { if (text >= 0) often[text] += 1; });
      return one.texts.map((text, number) => {
        const bag = new Map();
        if (!often[number]) return bag;
        wordsOf(text).forEach((word) => bag.set(word, (bag.get(word) ?? 0) + 1));
        bag.forEach((_, word) => documents.set(word, (documents.get(word) ?? 0) + often[number]));
        units += often[number];
        return bag;
      });
    });
    const weight = (word, times) => times * Math.log((1 + units) / documents.get(word));
    const length = (bag) => Math.hypot(...[...bag].map(([word, times]) => weight(word, times)));
    const mine = bags[layers.indexOf(layer)][own];
    const likeness = (bag) => {
      let product = 0;
      bag.forEach((times, word) => { if (mine.has(word)) product += weight(word, times) * weight(word, mine.get(word)); });
      return product / (length(bag) * length(mine) || 1);
    };
    const found = layers.flatMap((one, n) => {
      const likenesses = bags[n].map(likeness);
      return one.units.map((unit, at) => [one, at, likenesses[one.labels[0][at]] ?? 0])
        .filter(([of, at, value]) => value > 0 && !(of === layer && at === place));
    });
    // Of equals, those of this layer come first.
    return found.sort((a, b) => b[2] - a[2] || (b[0] === layer) - (a[0] === layer));
  };

  const build = (layer, card, siblings) => {
    const place = layer.places.get(card.unit);
    const labels = layer.labelers.map((name, n) => [name, card.labels[n]]).filter(([, label]) => label);
    const first = labels[0]?.[1] ?? null;
    const shown = exemplars(layer, card);
    // What the manifest says of the images comes in when it is there.
    $$("li", shown).forEach(async (one, rank) => {
      const about = await namesOf(layer, card.images[rank]);
      if (!about) return;
      const [label, path] = about;
      one.append(element("span.name", { title: path }, label ?? path.split("/").at(-1)));
      $("img", one).alt = `image ${card.images[rank]}${label ? `: ${label}` : ""}`;
    });
    const scores = card.scores.map((one) => [one.metric, one.labeler, one.judge, number(one.own), number(one.shuffled), number(one.constant), one.images ? one.images.toLocaleString("en") : "–"]);
    const near = card.near.map(([unit, value]) => [layer.places.get(unit), value]).filter(([at]) => at !== undefined);
    const alike = section("Units of this model with the most similar descriptions", element("ol.units"));
    if (first) fill(alike, layer, place, siblings).catch(complain);
    return element("article", {},
      element("header.unit", {},
        element("h2", { tabIndex: -1 }, first ? element("span.description", {}, shownText(first.text)) : null, element("small", {}, `unit ${card.unit}`)),
        facts([
          first && [first.lam === null ? "score" : "wPMI", number(first.score)],
          first && first.logp_d_given_e !== null && ["log p(d|E)", number(first.logp_d_given_e)],
          first && first.logp_d !== null && ["log p(d)", number(first.logp_d)],
          first && first.lam !== null && ["λ", number(first.lam)],
          ...(card.level ? levelFacts(card.level) : []),
          card.doubt && [...card.doubt, "warning"],
        ])),
      shown,
      element("div.columns", {},
        labels.length > 1 ? section("Described by", table(["labeler", "description", "its own score"],
          labels.map(([name, label]) => [name, shownText(label.text), number(label.score)]), "labelers")) : null,
        card.annotations.length ? section("Annotated", element("ul.plain", {}, ...card.annotations.map(([text, who, source]) =>
          element("li", {}, text, " ", element("small", {}, `${who}, ${source}`))))) : null,
        card.verdicts.length ? section("Verdicts", table(["verdict", "labeler", "judge", "q", "probability", "shuffled", "constant"],
          card.verdicts.map((one) => [element("span", { title: one.reason }, one.verdict), one.labeler, one.judge, number(one.q), number(one.probability), one.shuffled ?? "–", one.constant ?? "–"])),
          ...card.verdicts.map((one) => element("p.legend", {}, `${one.labeler}, ${one.judge}: ${one.reason}.`)),
          element("p.legend", {}, "q: rate of false discoveries at which the description counts as better than shuffled ones of its layer. Shuffled, constant: the verdict on another unit's description, and on the most frequent one.")) : null,
        scores.length ? section("Scores", table(["measure", "labeler", "judge", "value", "shuffled", "constant", "images"], scores),
          element("p.legend", {}, "Shuffled: another unit's description in place of this one's; constant: the labeler's most frequent one. What is not above them says little.")) : null,
        card.effect ? effects(card.effect) : null,
        ...labels.filter(([, label]) => label.best.length).map(([name, label]) => candidates(name, label))),
      near.length ? section("Units of this layer with the most similar exemplars", element("ol.units", {},
        ...near.map(([at, value]) => item(layer, at, `unit ${layer.units[at]} · cosine ${number(value)}`, [labelOf(layer, at)])))) : null,
      first ? alike : null);
  };
  // Comes in when the other layers' indices are there.
  const fill = async (section, layer, place, siblings) => {
    const found = sayTheSame(await Promise.all(siblings.map(layerAt)), layer, place);
    section.hidden = !found.length;
    const same = found.filter(([of, at]) => labelOf(of, at) === labelOf(layer, place)).length;
    if (same) $("h3", section).append(element("small", {}, ` ${count(same, "other")} ${same === 1 ? "says" : "say"} exactly this`));
    $(".units", section).append(...found.slice(0, NEAREST).map(([of, at, value]) =>
      item(of, at, `${of.layer} · unit ${of.units[at]} · cosine ${number(value)}`, [labelOf(of, at)])));
  };

  const start = () => {
    const [list, view, form] = [$("#list"), $("#unit"), $("[data-browse]")];
    const title = document.title;
    const siblings = JSON.parse(list.dataset.siblings);
    let back = ""; // the list as it was before
    let scroll = 0;
    let round = 0;

    const turn = async (layer, unit) => {
      const order = await milan.order();
      const at = order.findIndex(([, place]) => layer.units[place] === unit);
      const neighbour = (to, text, key) => {
        const found = at < 0 ? null : order[to];
        const href = found ? `#unit-${layer.units[found[1]]}` : null;
        const made = element("a.button", href ? { href } : { ariaDisabled: "true", role: "link" }, text);
        made.dataset.key = key;
        made.addEventListener("click", (event) => { // leaves going back to the list
          event.preventDefault();
          if (href) location.replace(href);
        });
        return made;
      };
      const masks = $(".masks", form).cloneNode(true); // in step with the form's own
      $$("input", masks).forEach((copy) => {
        const choice = $(`input[value=${copy.value}]`, form);
        copy.name = "masks-of-unit";
        copy.checked = choice.checked;
        copy.addEventListener("change", () => { choice.checked = true; choice.dispatchEvent(new Event("change")); });
      });
      return element("nav.turn", { ariaLabel: "Units" },
        element("a.button", { href: `#${back}` }, "‹ all units"),
        neighbour(at - 1, "‹ previous", "ArrowLeft"), neighbour(at + 1, "next ›", "ArrowRight"),
        at < 0 ? null : element("span", {}, `${(at + 1).toLocaleString("en")} of ${count(order.length)}`), masks);
    };

    const route = async () => {
      const match = /^#unit-(\d+)$/.exec(location.hash);
      round += 1;
      const mine = round;
      if (!match) {
        if (location.hash !== "#content") back = location.hash.slice(1);
        const were = !view.hidden;
        [list.hidden, form.hidden, view.hidden, document.title] = [false, false, true, title];
        view.replaceChildren();
        if (were) scrollTo(0, scroll);
        return;
      }
      if (view.hidden) scroll = scrollY;
      const unit = Number(match[1]);
      const layer = await layerAt(list.dataset.layer).catch(complain);
      const card = await cardOf(layer, unit).catch(complain);
      const body = card ? build(layer, card, siblings) : element("p.empty", {}, `This layer has no unit ${unit}.`);
      const nav = await turn(layer, unit);
      if (mine !== round) return;
      view.replaceChildren(nav, body);
      [list.hidden, form.hidden, view.hidden, document.title] = [true, true, false, `unit ${unit} · ${title}`];
      scrollTo(0, 0);
      $("h2", view)?.focus({ preventScroll: true });
    };
    addEventListener("hashchange", route);
    document.addEventListener("keydown", (event) => {
      if (view.hidden || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.tagName === "INPUT") return;
      if (event.key === "Escape") location.hash = back;
      if (/^Arrow(Left|Right)$/.test(event.key)) $(`[data-key=${event.key}]`, view)?.click();
    });
    route();
  };
  document.addEventListener("DOMContentLoaded", start);
})();
