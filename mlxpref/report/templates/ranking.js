"use strict";
// Opens a picture of the page, and compares any two. Texts are set as text, never as markup; pictures are copied from the list.
// The address names the open picture (#image-0-3), so that links lead to one and the back button closes it.

const Z95 = 1.959963984540054;
const sections = JSON.parse(document.getElementById("data").textContent);
const dialog = document.getElementById("compare");
const picture = document.getElementById("picture");
const selects = [...dialog.querySelectorAll("select")];
const pairs = sections.map((section) => new Map(section.pairs.map((pair) => [key(pair[0], pair[1]), pair])));
let open = 0; // the section that the dialog shows
let opened = null; // the list item whose picture is open

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
  const heading = element("h3", `${names[first]} shown first`);
  if (!samples.length) return [heading, element("p", "not asked in this order")];
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
  return [heading, body];
}

function inOneOrder([, , , , , shownFirst, shownSecond]) {
  return !shownFirst.length || !shownSecond.length;
}

function headlineOf(pair) {
  const { names } = sections[open];
  if (!pair) return "Not judged: estimated by the model of strengths.";
  const [a, b, p, pShownFirst, pShownSecond] = pair;
  if (pShownFirst === null && pShownSecond === null) return "Undecided: no completion could be read.";
  if (p === 0.5) return "Undecided: 50 % for either.";
  const oneRead = pShownFirst === null || pShownSecond === null;
  const source = inOneOrder(pair) ? "shown in one order" : oneRead ? "by the one order that could be read" : "both orders combined";
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

// One judged pair of the open picture: the other picture, and how the pair ended. A click compares the two.
function opponent(section, index, pair) {
  const [a, b, p, pShownFirst, pShownSecond] = pair;
  const { names, order: ranked } = sections[section];
  const other = a === index ? b : a;
  const share = a === index ? p : 1 - p;
  const ending = share === 0.5 ? "undecided" : `${share > 0.5 ? "won" : "lost"} with ${percent(share)}`;
  const unread = pShownFirst === null && pShownSecond === null;
  const rank = new Map(ranked).get(other);
  const shown = inOneOrder(pair) ? ", shown in one order" : "";
  const text = element("span", `${unread ? "unreadable" : ending} against rank\u00a0${rank}, ${names[other]}${shown}`);
  const made = element("button", "", ...pictureOf(section, other), text);
  made.type = "button";
  Object.assign(made.dataset, { section, first: index, second: other });
  return [rank, made];
}

function openPicture(item) {
  const [section, index] = [item.dataset.section, item.dataset.index].map(Number);
  const { names, axis, order: ranked } = sections[section];
  const rank = new Map(ranked).get(index);
  opened = item;
  picture.querySelector("h2").textContent = `Rank ${rank} of ${names.length}: ${names[index]}`;
  picture.querySelector(".large").replaceChildren(...item.querySelector(".picture").cloneNode(true).children);
  const bar = item.querySelector(".bar").cloneNode(true);
  bar.style.setProperty("--zero", item.parentElement.style.getPropertyValue("--zero"));
  picture.querySelector(".scale").replaceChildren(axis[0], bar, axis[1]);
  const another = element("button", "Compare with another image…");
  another.type = "button";
  const neighbour = item.nextElementSibling ?? item.previousElementSibling;
  Object.assign(another.dataset, { section, first: index, second: neighbour.dataset.index });
  picture.querySelector(".about").replaceChildren(...item.querySelector(".more").cloneNode(true).childNodes, element("p", "", another));
  const judged = sections[section].pairs.filter(([a, b]) => a === index || b === index);
  const others = judged.map((pair) => opponent(section, index, pair)).sort(([one], [two]) => one - two);
  picture.querySelector(".opponents").replaceChildren(...others.map(([, made]) => made));
  const count = `${others.length} image${others.length === 1 ? "" : "s"}`;
  picture.querySelector(":scope > div > h3").textContent = others.length ? `Judged against ${count}, by rank` : "";
  for (const button of picture.querySelectorAll("[data-step]")) button.disabled = !stepped(Number(button.dataset.step));
  if (dialog.open) dialog.close();
  if (!picture.open) picture.showModal();
  picture.scrollTop = 0;
}

function stepped(by) {
  return by < 0 ? opened?.previousElementSibling : opened?.nextElementSibling;
}

function step(by) {
  const item = stepped(by);
  if (!item) return;
  history.replaceState(null, "", `#${item.id}`);
  openPicture(item);
}

// Opens the picture that the address names, or closes the open one.
function follow() {
  const item = document.getElementById(location.hash.slice(1));
  if (item?.dataset.index) openPicture(item);
  else if (picture.open) picture.close();
}

document.addEventListener("click", (event) => {
  const { target } = event;
  const named = target.closest("[data-first]");
  const link = target.closest("a[href^='#image-']");
  if (named) compare(...[named.dataset.section, named.dataset.first, named.dataset.second].map(Number));
  else if (target.closest("[data-step]")) step(Number(target.closest("[data-step]").dataset.step));
  else if (link && link.hash === location.hash) follow(); // the address does not change
  else if (target === dialog || target === picture) target.close();
  else if (target.closest("[data-close]")) target.closest("dialog").close();
});
document.addEventListener("keydown", ({ key: pressed, target }) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[pressed];
  if (!by || dialog.open || target.tagName === "SELECT") return;
  if (picture.open) step(by);
  else {
    const item = target.closest(".ranked > li");
    (by < 0 ? item?.previousElementSibling : item?.nextElementSibling)?.querySelector("a").focus();
  }
});
picture.addEventListener("close", () => {
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
  opened.querySelector("a").focus();
});
addEventListener("hashchange", follow);
for (const select of selects) select.addEventListener("change", show);
for (const figure of document.querySelectorAll("figure[data-picture]")) {
  figure.prepend(...pictureOf(figure.closest("li").dataset.section, figure.dataset.picture));
}
for (const made of document.querySelectorAll("[data-scripted]")) made.hidden = false;
document.documentElement.className = "scripted";
follow();
