"use strict";
// Any two pictures of the page compared. Texts are set as text, never as markup; pictures are copied from the list.

const Z95 = 1.959963984540054;
const sections = JSON.parse(document.getElementById("data").textContent);
const dialog = document.querySelector("dialog");
const selects = [...dialog.querySelectorAll("select")];
const pairs = sections.map((section) => new Map(section.pairs.map((pair) => [key(pair[0], pair[1]), pair])));
let open = 0; // the section that the dialog shows
let picked = null; // the list item whose picture waits for a second one

function key(a, b) {
  return `${Math.min(a, b)} ${Math.max(a, b)}`;
}

function percent(p) {
  return `${(100 * p).toFixed(1)}\u00a0%`;
}

function element(tag, text = "", ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (text) made.dir = "auto";
  made.append(...children);
  return made;
}

// What shows an image a second time: a copy of its picture in the list, or nothing where it could not be read.
function pictureOf(section, index) {
  const listed = document.querySelector(`#image-${section}-${index} .picture img`);
  return listed ? [listed.cloneNode()] : [];
}


function sides(first, second) {
  const figures = [first, second].map((index, place) => {
    const caption = element("figcaption", "", element("b", `Image ${place + 1}`), `: ${sections[open].names[index]}`);
    return element("figure", "", ...pictureOf(open, index), caption);
  });
  const made = element("div", "", ...figures);
  made.className = "sides";
  return made;
}

// One order of a judged pair: the pictures in their places, the preference, and every sample.
function order(first, second, a, pShown, samples) {
  const { names } = sections[open];
  const answers = element("div");
  const preference = pShown === null ? "unreadable" : `${percent(pShown)} for ${names[a]}`;
  answers.append(element("p", preference + (samples.length > 1 ? `, the mean of ${samples.length} samples` : "")));
  if (samples.every((sample) => !sample[1])) answers.append(element("p", "judged without thinking, so without reasons"));
  for (const [p, text, closed] of samples) {
    const about = [];
    if (samples.length > 1) about.push(p === null ? "unreadable" : `${percent(p)} for image 1`);
    if (closed) about.push("ran out of tokens and was read there");
    if (text || about.length) answers.append(element("blockquote", (about.length ? `(${about.join("; ")}) ` : "") + text));
  }
  const body = element("div", "", sides(first, second), answers);
  body.className = "order";
  return [element("h3", `${names[first]} shown first`), body];
}

function headlineOf(pair) {
  const { names } = sections[open];
  if (!pair) return "Not judged: estimated by the model of strengths.";
  const [a, b, p, pShownFirst, pShownSecond] = pair;
  if (pShownFirst === null && pShownSecond === null) return "Undecided: no completion could be read.";
  if (p === 0.5) return "Undecided: 50 % for either.";
  const source = pShownFirst === null || pShownSecond === null ? "by the one order that could be read" : "both orders combined";
  return `${names[p > 0.5 ? a : b]} is preferred, ${percent(Math.max(p, 1 - p))}, ${source}.`;
}

// What the strengths say of a pair: 1 / (1 + exp(-(s_a - s_b))), and that at both ends of the difference's interval.
function estimateOf(a, b, judged) {
  const { names, strengths, deviations } = sections[open];
  const [stronger, weaker] = strengths[a] >= strengths[b] ? [a, b] : [b, a];
  const [low, high] = [Math.min(a, b), Math.max(a, b)];
  const difference = strengths[stronger] - strengths[weaker];
  const margin = (Z95 * deviations[low][high - low - 1]) / 1000;
  const [middle, from, to] = [0, -margin, margin].map((x) => percent(1 / (1 + Math.exp(-difference - x))));
  const source = judged ? "The model of strengths, from all pairs together, estimates" : "Estimated from the pairs that were asked:";
  return `${source} ${middle} for ${names[stronger]}, 95\u00a0% interval ${from} to ${to}.`;
}

function show() {
  const [a, b] = selects.map((select) => Number(select.value));
  selects.forEach((select, side) => {
    for (const option of select.options) option.disabled = option.value === selects[1 - side].value;
    select.nextElementSibling.replaceChildren(...pictureOf(open, Number(select.value)));
  });
  const pair = pairs[open].get(key(a, b));
  dialog.querySelector(".headline").textContent = headlineOf(pair);
  dialog.querySelector(".estimate").textContent = estimateOf(a, b, Boolean(pair));
  const orders = dialog.querySelector(".orders");
  orders.replaceChildren();
  if (pair) {
    const [first, second, , pShownFirst, pShownSecond, saidFirst, saidSecond] = pair;
    orders.append(...order(first, second, first, pShownFirst, saidFirst));
    orders.append(...order(second, first, first, pShownSecond, saidSecond));
  }
}

function compare(section, a, b) {
  open = section;
  const { names, order: ranked } = sections[open];
  for (const [select, index] of [[selects[0], a], [selects[1], b]]) {
    select.replaceChildren(...ranked.map(([index, rank]) => new Option(`${rank}. ${names[index]}`, index)));
    select.value = index;
  }
  show();
  dialog.showModal();
  selects[0].focus();
  dialog.scrollTop = 0;
}

function mark(item) {
  picked?.querySelector("[aria-pressed]").setAttribute("aria-pressed", "false");
  item?.querySelector("[aria-pressed]").setAttribute("aria-pressed", "true");
  const name = item && sections[item.dataset.section].names[item.dataset.index];
  document.querySelector(".status").textContent = item ? `${name} is picked: now pick the picture to compare it with.` : "";
  picked = item;
}

function pick(item) {
  if (!picked || picked.dataset.section !== item.dataset.section) mark(item);
  else {
    const first = picked;
    mark(null);
    if (first !== item) compare(...[item.dataset.section, first.dataset.index, item.dataset.index].map(Number));
  }
}

document.addEventListener("click", ({ target }) => {
  const named = target.closest("[data-first]");
  const { section } = target.closest("[data-section]")?.dataset ?? {};
  if (named) compare(...[section, named.dataset.first, named.dataset.second].map(Number));
  else if (target.closest(".picture img, .picture button")) pick(target.closest("li"));
  else if (target === dialog || target.closest("[data-close]")) dialog.close();
});
document.addEventListener("keydown", ({ key: pressed }) => {
  if (pressed === "Escape" && !dialog.open) mark(null);
});
for (const select of selects) select.addEventListener("change", show);
for (const figure of document.querySelectorAll("figure[data-picture]")) {
  figure.prepend(...pictureOf(figure.closest("li").dataset.section, figure.dataset.picture));
}
for (const made of document.querySelectorAll("[data-scripted]")) made.hidden = false;
