"use strict";
// One question after the other. The program behind the page keeps an answer before the next question is shown. Texts are
// set as text, never as markup.

const { prompts, names, output } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const sides = [byId("first"), byId("second")];
const KEYS = { ArrowLeft: "first", ArrowRight: "second", ArrowDown: "tie", t: "tie", s: "skip" };
const EXACT = 128; // pictures this small are shown with their own pixels
const FEW = 100; // up to this many pictures the ranking follows every answer
const SELDOM = 25; // answers between two rankings of more pictures
let state = null;
let shownAt = 0; // the time from which both pictures of the question are seen; 0 before
let busy = true; // a question is answered once, however often a key is pressed; see `work`
let finished = false;
let ranking = { task: -1, number: -1, asked: false };

function say(text, bad = false) {
  byId("message").textContent = text;
  byId("message").classList.toggle("bad", bad);
}

// While one request runs no other starts; a screen reader says so.
function work(isBusy) {
  busy = isBusy;
  byId("asking").setAttribute("aria-busy", isBusy);
  if (!isBusy) for (const button of document.querySelectorAll(".picked")) button.classList.remove("picked");
}

async function ask(path, body) {
  const request = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  let answer;
  try {
    answer = await fetch(path, request);
  } catch {
    const lost = body ? ", and this answer is lost" : "";
    throw new Error(`The program behind this page has ended${lost}. Start \`mlxpref label\` again: it continues after the last answer.`);
  }
  const reply = await answer.json().catch(() => ({ error: `The program behind this page gave no usable answer (${answer.status}): reload the page.` }));
  if (reply.error) throw new Error(reply.error);
  return { reply, late: answer.status === 409 };
}

function share({ count, of, low, high }) {
  if (!of) return "none yet";
  return `${count} of ${of} (${Math.round(100 * low)} to ${Math.round(100 * high)}\u00a0%)`;
}

function show(side, image) {
  const picture = sides[side];
  picture.classList.remove("exact");
  return new Promise((done) => {
    picture.onload = () => {
      picture.classList.toggle("exact", Math.max(picture.naturalWidth, picture.naturalHeight) <= EXACT);
      done(true);
    };
    picture.onerror = () => done(false);
    picture.src = `pictures/${image}`;
  });
}

async function showQuestion() {
  const { question, task, upcoming } = state;
  shownAt = 0;
  byId("asking").classList.toggle("over", !question); // the last answer can still be taken back
  byId("prompt").textContent = question ? `“${prompts[task]}”` : "Every pair was asked.";
  if (!question) return;
  const seen = await Promise.all(question.map((image, side) => show(side, image)));
  if (seen.every(Boolean)) {
    shownAt = performance.now();
    for (const image of upcoming) new Image().src = `pictures/${image}`;
  } else say("A picture can no longer be read: skip this pair.", true);
}

function showProgress() {
  const { asked, planned, answers, ties, skips, repeats, first, enough, undo } = state;
  byId("count").textContent = asked < planned ? `${asked} of ${planned} pairs` : `${asked} pairs, all that were planned`;
  byId("progress").max = planned;
  byId("progress").value = Math.min(asked, planned);
  byId("answer-count").textContent = `${answers}, ${ties} of them ties; ${skips} skipped`;
  byId("repeats").textContent = repeats.of ? `the same ${share(repeats)}` : "none yet";
  byId("left").textContent = share(first);
  byId("undo").disabled = !undo;
  const wanted = enough.needed === null ? "" : ` of ${enough.needed}`;
  const measuring = enough.held_out_needed ? `, ${enough.held_out} of ${enough.held_out_needed} held out` : "";
  byId("verdict").textContent = `${enough.reached ? "Enough" : "Not yet enough"} to train: ${enough.decided}${wanted} pairs decided${measuring}.`;
  byId("why").textContent = enough.why;
  byId("commands").hidden = !enough.reached;
  const file = /^[\w./-]+$/.test(output) ? output : `'${output.replaceAll("'", "'\\''")}'`;
  document.querySelector("#commands pre").textContent =
    `mlxpref train --data ${file} --output runs/taste\nmlxpref eval --data ${file} --adapter runs/taste`;
}

async function showState(reply) {
  state = reply;
  showProgress();
  await showQuestion();
  byId("asking").dataset.number = state.number;
  work(false);
  showRanking();
}

async function change(path, body, words) {
  if (busy) return;
  work(true);
  try {
    const { reply, late } = await ask(path, { number: state.number, ...body });
    say(late ? "This was answered in another tab. Here is the current question." : words);
    await showState(reply);
  } catch (error) {
    say(error.message, true);
    work(false);
  }
}

function choose(choice) {
  if (busy || !state.question) return;
  const seconds = shownAt ? (performance.now() - shownAt) / 1000 : null;
  for (const button of document.querySelectorAll(`.pictures [data-choice=${choice}]`)) button.classList.add("picked");
  const words = { first: "Left.", second: "Right.", tie: "A tie.", skip: "Skipped." };
  change("answer", { choice, seconds }, words[choice]);
}

function undo() {
  if (state && state.undo) change("undo", {}, "Undone: answer this pair again.");
}

// Intervals of a prompt's pictures, best first. A fit of many pictures takes seconds, so that it is asked for seldom.
async function showRanking(now = false) {
  if (!state || !byId("so-far").open || ranking.asked || finished) return;
  const task = Number(byId("task").value);
  const old = task !== ranking.task || now;
  if (!old && state.number - ranking.number < (names.length <= FEW ? 1 : SELDOM)) return;
  ranking = { task, number: state.number, asked: true };
  try {
    drawRanking((await ask(`ranking/${task}`)).reply);
  } catch (error) {
    if (!finished) say(error.message, true);
  }
  ranking.asked = false;
  if (state.number !== ranking.number || task !== Number(byId("task").value)) showRanking();
}

function element(tag, name, text = "", ...children) {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  made.append(...children);
  return made;
}

function drawRanking({ ticks, images }) {
  const [start, end] = [ticks[0], ticks[ticks.length - 1]];
  const at = (strength) => `${(100 * (strength - start)) / (end - start)}%`;
  document.querySelector(".ticks").replaceChildren(...ticks.map((tick) => element("span", "", String(Number(tick.toPrecision(6))).replace("-", "\u2212"))));
  const list = document.querySelector(".ranked");
  const pictures = new Map([...list.querySelectorAll("img")].map((picture) => [picture.dataset.image, picture]));
  list.style.setProperty("--steps", ticks.length - 1);
  list.replaceChildren(
    ...images.map(({ image, rank, strength, low, high, wins, pairs, tied_with: ties }) => {
      const picture = pictures.get(String(image)) || smallPicture(image);
      const bar = element("div", "bar", "", element("span", ""), element("i", ""));
      Object.assign(bar.firstChild.style, { left: at(low), width: `${(100 * (high - low)) / (end - start)}%` });
      bar.lastChild.style.left = at(strength);
      const range = `strength ${strength.toFixed(1)}, 95 % interval ${low.toFixed(1)} to ${high.toFixed(1)}`;
      bar.title = `${range}; ${ties.length ? `tied with ${ties.length} others` : "tied with no other image"}`;
      bar.setAttribute("role", "img");
      bar.setAttribute("aria-label", bar.title);
      const won = element("span", "won", pairs ? `${wins} of ${pairs} won` : "not asked yet");
      return element("li", "", "", element("span", "rank", String(rank)), picture, element("span", "name", names[image]), bar, won);
    })
  );
}

function smallPicture(image) {
  const picture = element("img", "");
  Object.assign(picture, { loading: "lazy", alt: names[image], title: names[image], src: `small/${image}` });
  picture.dataset.image = image;
  picture.onload = () => picture.classList.toggle("exact", Math.max(picture.naturalWidth, picture.naturalHeight) <= EXACT);
  return picture;
}

async function finish() {
  if (busy) return;
  work(true);
  try {
    await ask("finish", {});
    finished = true;
    byId("asking").hidden = byId("undo").hidden = byId("finish").hidden = true;
    byId("commands").hidden = false;
    byId("prompt").textContent = "Finished.";
    scrollTo(0, 0);
    say(`All answers are in ${output}. You can close this page; the same command continues with that file.`);
  } catch (error) {
    say(error.message, true);
    work(false);
  }
}

// Who has scrolled down to the ranking reads it with the arrow keys.
function isInSight(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return bottom > 0 && top < innerHeight;
}

document.addEventListener("keydown", (event) => {
  const typed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const withCommand = event.ctrlKey || event.metaKey;
  if (event.altKey || event.repeat || !state || event.target.closest("select") || finished) return;
  if ((withCommand && typed === "z" && !event.shiftKey) || (!withCommand && (typed === "u" || typed === "Backspace"))) {
    event.preventDefault();
    undo();
  } else if (!withCommand && !event.shiftKey && KEYS[typed] && isInSight(byId("asking"))) {
    event.preventDefault();
    choose(KEYS[typed]);
  }
});
for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
byId("undo").addEventListener("click", undo);
byId("finish").addEventListener("click", finish);
byId("so-far").addEventListener("toggle", () => showRanking(true));
byId("task").append(...prompts.map((prompt, number) => new Option(prompt, number)));
byId("task").hidden = prompts.length < 2;
byId("task").addEventListener("change", () => showRanking(true));

ask("state").then(({ reply }) => showState(reply)).catch((error) => say(`${error.message} Then reload this page.`, true));
