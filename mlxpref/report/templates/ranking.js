"use strict";
// Opens a picture of the page, and compares any two. Texts are set as text, never as markup; pictures are copied from the list.
// The address names the open picture (#image-0-3), so that links lead to one and the back button closes it, or a page of
// many images (#page-0-2). The images of a page are markup that the template escaped, and text until the page is shown.

const Z95 = 1.959963984540054;
const sections = JSON.parse(document.getElementById("data").textContent);
const dialog = document.getElementById("compare");
const picture = document.getElementById("picture");
const selects = [...dialog.querySelectorAll("select")];
const pairs = sections.map((section) => new Map(section.pairs.map((pair, number) => [key(pair[0], pair[1]), { pair, number }])));
const places = sections.map((section) => new Map(section.order.map(([index], place) => [index, place])));
const lists = [...document.querySelectorAll(".ranked")];
const firsts = lists.map((list) => [...list.children]); // the images that stand in the page itself
const shown = firsts.map((items) => (items.length ? 1 : 0)); // the page of each section that is shown
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

function parsed(text) {
  const template = document.createElement("template");
  template.innerHTML = text;
  return [...template.content.children];
}

function textOf(section, page) {
  return document.getElementById(`page-${section}-${page}`).textContent;
}

function pageOf(section, index) {
  return 1 + Math.floor(places[section].get(index) / sections[section].page);
}

function rankOf(section, index) {
  return sections[section].order[places[section].get(index)][1];
}

// The list item of an image, on whatever page: the one that is shown, or made of the page's text.
function itemOf(section, index) {
  const id = `image-${section}-${index}`;
  const listed = document.getElementById(id) ?? firsts[section].find((item) => item.id === id);
  if (listed) return listed;
  const text = textOf(section, pageOf(section, index));
  const start = text.indexOf(`<li id="${id}"`);
  return parsed(text.slice(start, text.indexOf("</li>", start)))[0];
}

function turnTo(section, page) {
  if (page === shown[section]) return;
  const list = lists[section];
  list.replaceChildren(...(page === 1 && firsts[section].length ? firsts[section] : parsed(textOf(section, page))));
  list.classList.toggle("further", page > 1);
  list.classList.remove("later");
  shown[section] = page;
  for (const made of list.querySelectorAll("[data-scripted]")) made.hidden = false;
  showPagers();
}

function showPagers() {
  for (const pager of document.querySelectorAll(".pager")) {
    const page = shown[pager.dataset.section];
    const select = pager.querySelector("select");
    select.value = page;
    for (const button of pager.querySelectorAll("[data-turn]")) button.disabled = !select.querySelector(`[value="${page + Number(button.dataset.turn)}"]`);
  }
}

// Another page by its pager: the address changes, and whoever is at the end of a page begins at the top of the next.
function turn(pager, page) {
  const { section } = pager.dataset;
  history.replaceState([...shown], ""); // where the way back leads
  location.hash = `page-${section}-${page}`;
  const [top] = document.querySelectorAll(`.pager[data-section="${section}"]`);
  top.querySelector("select").focus({ preventScroll: true });
  top.scrollIntoView();
}

// What shows an image a second time: a copy of its picture in the list, or nothing where it could not be read.
function pictureOf(section, index) {
  const listed = itemOf(section, index).querySelector(".picture img");
  return listed ? [document.importNode(listed)] : [];
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
  const { names, only_scores } = sections[open];
  const answers = element("div");
  const heading = element("h3", isByScores(sections[open]) ? "Each by itself" : `${names[first]} shown first`);
  if (!samples.length) return [heading, element("p", "not asked in this order")];
  const said = only_scores ? `${names[a]} has ${higherScore(pShown)} ${names[first === a ? second : first]}` : `${percent(pShown)} for ${names[a]}`;
  const preference = pShown === null ? "unreadable" : said;
  answers.append(element("p", preference + (samples.length > 1 ? `, the mean of ${samples.length} samples` : "")));
  if (samples.every((sample) => !sample[1])) answers.append(element("p", "judged without thinking, so without reasons"));
  for (const [p, text, closed] of samples) {
    const about = [];
    if (samples.length > 1 && !only_scores) about.push(p === null ? "unreadable" : `${percent(p)} for image 1`);
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

// Whether the strengths of a section have no errors: they are scores of single images.
function isByScores({ deviations, errors }) {
  return !deviations.length && !errors.length;
}

// Which of two scores is higher: without a fitted temperature they say no more.
function higherScore(share) {
  return share === 0.5 ? "the same score as" : `a ${share > 0.5 ? "higher" : "lower"} score than`;
}

function headlineOf(pair) {
  const { names, only_scores } = sections[open];
  if (isByScores(sections[open]) && (!pair || only_scores)) return "Each image was scored by itself.";
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
  const { names, strengths, deviations, errors, paired, only_scores } = sections[open];
  const [stronger, weaker] = strengths[a] >= strengths[b] ? [a, b] : [b, a];
  const [low, high] = [Math.min(a, b), Math.max(a, b)];
  const difference = strengths[stronger] - strengths[weaker];
  if (only_scores) {
    const share = strengths[a] === strengths[b] ? 0.5 : 1;
    return `${names[stronger]} has ${higherScore(share)} ${names[weaker]}. How many people would prefer it, scores alone do not say.`;
  }
  const share = (x) => percent(1 / (1 + Math.exp(-difference - x)));
  if (isByScores(sections[open])) return `${share(0)} for ${names[stronger]}, by the difference of their scores.`;
  const deviation = judged && paired.length ? paired[judged.number] : errors.length ? Math.hypot(errors[a], errors[b]) : deviations[low][high - low - 1];
  const margin = (Z95 * deviation) / 1000;
  const [middle, from, to] = [0, -margin, margin].map(share);
  const source = judged ? "The model of strengths, from all pairs together, estimates" : "Estimated from the pairs that were asked:";
  const about = errors.length && !judged ? "about " : "";
  return `${source} ${middle} for ${names[stronger]}, 95\u00a0% interval ${about}${from} to ${to}.`;
}

function show() {
  const [a, b] = selects.map((select) => Number(select.value));
  selects.forEach((select, side) => {
    for (const option of select.querySelectorAll(":disabled")) option.disabled = false;
    select.options[places[open].get(Number(selects[1 - side].value))].disabled = true;
    select.nextElementSibling.replaceChildren(...pictureOf(open, Number(select.value)));
  });
  const judged = pairs[open].get(key(a, b));
  const pair = judged?.pair;
  dialog.querySelector(".headline").textContent = headlineOf(pair);
  dialog.querySelector(".estimate").textContent = estimateOf(a, b, judged);
  dialog.querySelector(".meaning").hidden = isByScores(sections[open]);
  const orders = dialog.querySelector(".orders");
  orders.replaceChildren();
  if (pair) {
    const [first, second, , pShownFirst, pShownSecond, saidFirst, saidSecond] = pair;
    orders.append(...order(first, second, first, pShownFirst, saidFirst));
    if (!isByScores(sections[open])) orders.append(...order(second, first, first, pShownSecond, saidSecond));
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
  const { names, only_scores } = sections[section];
  const other = a === index ? b : a;
  const share = a === index ? p : 1 - p;
  const ending = share === 0.5 ? "undecided" : `${share > 0.5 ? "won" : "lost"} with ${percent(share)}`;
  const unread = pShownFirst === null && pShownSecond === null;
  const rank = rankOf(section, other);
  const once = inOneOrder(pair) ? ", shown in one order" : "";
  const outcome = only_scores && !unread ? higherScore(share) : `${unread ? "unreadable" : ending} against`;
  const text = element("span", `${outcome} rank\u00a0${rank}, ${names[other]}${once}`);
  const made = element("button", "", ...pictureOf(section, other), text);
  made.type = "button";
  Object.assign(made.dataset, { section, first: index, second: other });
  return [rank, made];
}

function openPicture(section, index) {
  const { names, axis } = sections[section];
  const rank = rankOf(section, index);
  turnTo(section, pageOf(section, index));
  const item = itemOf(section, index);
  opened = item;
  picture.querySelector("h2").textContent = `Rank ${rank} of ${names.length}: ${names[index]}`;
  picture.querySelector(".large").replaceChildren(...item.querySelector(".picture").cloneNode(true).children);
  const bar = item.querySelector(".bar").cloneNode(true);
  bar.style.setProperty("--zero", item.parentElement.style.getPropertyValue("--zero"));
  picture.querySelector(".scale").replaceChildren(axis[0], bar, axis[1]);
  const another = element("button", "Compare with another image…");
  another.type = "button";
  Object.assign(another.dataset, { section, first: index, second: neighbour(item, 1) ?? neighbour(item, -1) });
  picture.querySelector(".about").replaceChildren(...item.querySelector(".more").cloneNode(true).childNodes, element("p", "", another));
  for (const figure of picture.querySelectorAll("[data-picture]")) figure.prepend(...pictureOf(section, Number(figure.dataset.picture)));
  const judged = sections[section].pairs.filter(([a, b]) => a === index || b === index);
  const others = judged.map((pair) => opponent(section, index, pair)).sort(([one], [two]) => one - two);
  picture.querySelector(".opponents").replaceChildren(...others.map(([, made]) => made));
  const count = `${others.length} image${others.length === 1 ? "" : "s"}`;
  picture.querySelector(":scope > div > h3").textContent = others.length ? `Judged against ${count}, by rank` : "";
  for (const button of picture.querySelectorAll("[data-step]")) button.disabled = neighbour(item, Number(button.dataset.step)) === undefined;
  if (!picture.open) picture.showModal();
  picture.scrollTop = 0;
}

// The image before or after one in the order, perhaps on another page; undefined at the ends.
function neighbour(item, by) {
  const section = Number(item.dataset.section);
  return sections[section].order[places[section].get(Number(item.dataset.index)) + by]?.[0];
}

function step(by) {
  const [section, index] = [Number(opened.dataset.section), neighbour(opened, by)];
  if (index === undefined) return;
  history.replaceState(null, "", `#image-${section}-${index}`);
  openPicture(section, index);
}

// Opens the picture that the address names, or closes the open one and shows the page that it names, else the first.
function follow() {
  if (dialog.open) dialog.close();
  const [, kind, ...numbers] = location.hash.match(/^#(image|page)-(\d+)-(\d+)$/) ?? [];
  const [section, number] = numbers.map(Number);
  if (kind === "image" && places[section]?.has(number)) return openPicture(section, number);
  if (picture.open) picture.close();
  if (kind === "page" && number > 0 && sections[section]?.order[(number - 1) * sections[section].page]) turnTo(section, number);
  else if (!location.hash && !history.state) shown.forEach((page, section) => page && turnTo(section, 1));
}

document.addEventListener("click", (event) => {
  const { target } = event;
  const named = target.closest("[data-first]");
  const link = target.closest("a[href^='#image-']");
  if (named) compare(...[named.dataset.section, named.dataset.first, named.dataset.second].map(Number));
  else if (target.closest("[data-step]")) step(Number(target.closest("[data-step]").dataset.step));
  else if (target.closest("[data-turn]")) {
    const { parentElement, dataset } = target.closest("[data-turn]");
    turn(parentElement, shown[parentElement.dataset.section] + Number(dataset.turn));
  }
  else if (link && link.hash === location.hash) follow(); // the address does not change
  else if (target === dialog || target === picture) target.close();
  else if (target.closest("[data-close]")) target.closest("dialog").close();
});
document.addEventListener("keydown", ({ key: pressed, target, altKey, ctrlKey, metaKey }) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[pressed];
  if (!by || altKey || ctrlKey || metaKey || dialog.open || target.tagName === "SELECT") return;
  if (picture.open) step(by);
  else {
    const item = target.closest(".ranked > li");
    const index = item ? neighbour(item, by) : undefined;
    if (index === undefined) return;
    const section = Number(item.dataset.section);
    const page = pageOf(section, index);
    if (page !== shown[section]) history.replaceState(null, "", `#page-${section}-${page}`);
    turnTo(section, page);
    itemOf(section, index).querySelector("a").focus();
  }
});
picture.addEventListener("close", () => {
  const { section } = opened.dataset;
  const address = shown[section] > 1 ? `#page-${section}-${shown[section]}` : location.pathname + location.search;
  if (location.hash.startsWith("#image")) history.replaceState(null, "", address);
  (document.getElementById(opened.id) ?? lists[section].firstElementChild)?.querySelector("a").focus();
});
addEventListener("popstate", ({ state }) => state?.forEach((page, section) => page && turnTo(section, page)));
addEventListener("hashchange", follow);
for (const select of selects) select.addEventListener("change", show);
for (const select of document.querySelectorAll("[data-page]")) select.addEventListener("change", () => turn(select.parentElement, Number(select.value)));
// Only lists below: one above would grow, and move what is being read where the browser does not hold it in place.
const coming = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting && !shown[lists.indexOf(target)]) turnTo(lists.indexOf(target), 1);
}, { rootMargin: "0px 0px 1000px" });
for (const list of document.querySelectorAll(".later")) coming.observe(list);
for (const made of document.querySelectorAll("[data-scripted]")) made.hidden = false;
showPagers();
document.documentElement.className = "scripted";
follow();
const [, linked] = location.hash.match(/^#page-(\d+)-\d+$/) ?? [];
if (linked && sections.length > 1) document.getElementById(`prompt-${linked}`)?.scrollIntoView();
