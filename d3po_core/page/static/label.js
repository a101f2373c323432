// Keys, touches and requests. The server renders everything visible; each reply replaces the page's middle as a whole.
//
// localStorage keeps a judgement until the server confirms that it is on disk; until then this script sends it again.
// Each judgement has an id made here, so the server stores it once, however often it arrives.
"use strict";

const page = document.getElementById("page");
const note = document.getElementById("note");
const { rater, base } = page.dataset;
const outbox = `d3po unsent ${rater} `;
const PAUSES = [500, 1000, 2000, 4000, 8000];

let middle, images, tiles, picked, seen, shownAt, hiddenFor, hiddenSince, preloaded = [];
let busy = false, lastFocus = null;

// ---------------------------------------------------------------- showing

function show(html) {
  const kept = middle && { ticket: middle.dataset.ticket, picked, seen, shownAt, hiddenFor };
  if (html !== undefined) {
    page.innerHTML = html;
    poll.last = html.trim();
  }
  middle = page.querySelector(".middle");
  tiles = [...page.querySelectorAll(".tile")];
  images = [...page.querySelectorAll("button.image")];
  const same = kept && kept.ticket && kept.ticket === middle.dataset.ticket; // a report changes no answer
  picked = same ? kept.picked : pickedBefore();
  seen = same ? kept.seen : new Set();
  document.title = middle.dataset.title;
  layOut();
  mark();
  page.querySelector(".tiles")?.addEventListener("scroll", see, { passive: true });
  hiddenFor = same ? kept.hiddenFor : 0;
  hiddenSince = document.hidden ? performance.now() : null;
  shownAt = same ? kept.shownAt : null; // unknown until every image is loaded
  const ticket = middle.dataset.ticket;
  Promise.allSettled(pictures().map((picture) => picture.decode())).then(() => {
    if (middle.dataset.ticket !== ticket) return;
    for (const picture of pictures()) picture.classList.toggle("small", picture.naturalWidth * 1.5 <= picture.clientWidth * devicePixelRatio);
    shownAt ??= performance.now();
  });
  preloaded = middle.dataset.ahead.split(" ").filter(Boolean).map((url) => Object.assign(new Image(), { src: url }));
  if (middle.dataset.mode === "pair" || !images.length) page.querySelector("h1").focus({ preventScroll: true });
  else images[same ? Number(reporting.dataset.index || 0) : 0].focus({ preventScroll: true });
}

// The marks of the answer that the rater has just taken back.
function pickedBefore() {
  const values = middle.dataset.before.split(" ").filter(Boolean).map(Number), rest = Math.max(...values);
  const order = [...values.keys()].sort((a, b) => values[a] - values[b]);
  const { mode } = middle.dataset;
  if (mode === "mark_bad") return order.filter((index) => values[index] === 0);
  if (mode === "pair") {
    document.getElementById(rest > 0 ? "" : rest < 0 ? "bad" : "tie")?.classList.toggle("before", values.length > 0);
    return order.filter((index) => values[index] > 0);
  }
  return order.filter((index) => values[index] < rest); // best and rank: the rest was equal
}

const pictures = () => images.map((button) => button.querySelector("img"));

function layOut() {
  const box = page.querySelector(".tiles");
  if (!box) return;
  const gap = parseFloat(getComputedStyle(box).columnGap) || 0;
  const width = box.clientWidth - 14, height = box.clientHeight - 14, n = images.length;
  const aspect = Number(box.dataset.aspect); // the images of a question have one size; a tile has their shape
  const shorter = Math.min(1, 1 / aspect), longer = Math.max(1, 1 / aspect); // sides, as multiples of a tile's width
  let best = { size: 0, columns: 1 };
  for (let columns = 1; columns <= n; columns++) {
    const rows = Math.ceil(n / columns);
    const size = Math.floor(Math.min((width - gap * (columns - 1)) / columns, (height - gap * (rows - 1)) / rows * aspect));
    if (size > best.size) best = { size, columns };
  }
  const smallest = matchMedia("(pointer: coarse)").matches ? 96 : 64;
  if (best.size * shorter < smallest) { // too many for one screen: touchable sizes, and scrolling
    const size = Math.min(120 / shorter, width);
    best = { columns: Math.max(1, Math.floor((width + gap) / (size + gap))), size };
    box.style.alignContent = "start";
  }
  box.style.setProperty("--size", `${Math.min(best.size, 768 / longer)}px`);
  box.style.setProperty("--aspect", aspect);
  box.style.setProperty("--columns", best.columns);
  box.classList.toggle("tiny", best.size * shorter < 96);
  see();
}

// An image counts as seen once most of it was on the screen. Nothing is saved before all were seen.
function see() {
  const box = page.querySelector(".tiles")?.getBoundingClientRect();
  if (!box) return;
  const top = Math.max(box.top, 0), bottom = Math.min(box.bottom, innerHeight);
  tiles.forEach((tile, index) => {
    const { top: from, bottom: to, height } = tile.getBoundingClientRect();
    const fits = Math.min(height, bottom - top); // a very low screen never shows a whole image
    if (Math.min(to, bottom) - Math.max(from, top) > fits * 0.7) seen.add(index);
  });
  mark();
}

const unseen = () => tiles.length - seen.size;

function seeAllFirst() {
  if (!unseen()) return false;
  say(`${unseen()} more to see below; scroll to them first.`);
  return true;
}

function mark() {
  const mode = middle.dataset.mode;
  images.forEach((button, index) => {
    const at = picked.indexOf(index);
    tiles[index].classList.toggle("chosen", at >= 0);
    if (mode === "mark_bad") button.setAttribute("aria-pressed", String(at >= 0));
    if (mode === "rank") button.setAttribute("aria-label", at >= 0 ? `Image ${index + 1}: rank ${at + 1}` : `Image ${index + 1} of ${images.length}: next in the order`);
    if (blurred(index)) button.setAttribute("aria-label", `Image ${index + 1} of ${images.length}: reported and blurred; choose it to see it`);
    else if (button.getAttribute("aria-label").includes("blurred")) button.setAttribute("aria-label", `Image ${index + 1} of ${images.length}: ${page.querySelector(".tiles").dataset.image}`);
    button.querySelector(".mark").dataset.text = { mark_bad: "bad", rank: String(at + 1), pair: "better" }[mode] || "best";
  });
  const more = document.getElementById("more");
  if (more) {
    more.hidden = !unseen();
    more.textContent = `${unseen()} more below ↓`;
  }
  const save = document.querySelector("#save span");
  if (!save) return;
  if (mode === "mark_bad") save.textContent = picked.length ? `Save: ${picked.length} bad` : "Save: none is bad";
  else save.textContent = picked.length < images.length - 1 && picked.length ? "Save: the rest is equal" : "Save";
  document.getElementById("save").disabled = unseen() > 0 || (mode === "rank" && !picked.length);
}

function say(text, forGood = false) {
  note.textContent = text;
  clearTimeout(say.timer);
  if (text && !forGood) say.timer = setTimeout(() => { note.textContent = ""; }, 4000);
}

// ---------------------------------------------------------------- judging

function pick(index) {
  if (busy || !images[index]) return;
  if (blurred(index)) return reveal(index);
  const mode = middle.dataset.mode;
  if (mode === "pair") return seeAllFirst() || judge(index === 0 ? [1, -1] : [-1, 1]);
  const at = picked.indexOf(index);
  if (mode === "best") {
    if (seeAllFirst()) return;
    picked = [index];
    mark();
    return judge(images.map((_, i) => (i === index ? 1 : 2)));
  }
  if (at >= 0) picked.splice(at, 1);
  else picked.push(index);
  mark();
}

function save() {
  const mode = middle.dataset.mode;
  if (seeAllFirst()) return;
  if (mode === "mark_bad") judge(images.map((_, index) => (picked.includes(index) ? 0 : 1)));
  if (mode === "rank" && picked.length) {
    judge(images.map((_, index) => (picked.includes(index) ? picked.indexOf(index) : picked.length) + 1));
  }
}

function judge(values) {
  if (busy || middle.dataset.state !== "question") return;
  let seconds = shownAt === null ? null : Math.max(0, (performance.now() - shownAt - hiddenFor) / 1000);
  if (seconds > 86400) seconds = null; // left open: nobody looks at one question for a day
  send("judge", { ticket: middle.dataset.ticket, action: values ? "answer" : "skip", values: values || [], seconds });
}

function tie() {
  if (!seeAllFirst()) judge([0, 0]);
}

function bothBad() {
  if (!seeAllFirst()) judge([-1, -1]);
}

function showMore() {
  const next = tiles.findIndex((_, index) => !seen.has(index));
  if (next >= 0) images[next].focus();
}

function undo() {
  if (!busy && middle.dataset.undo) send("undo", { entry: Number(middle.dataset.undo) });
}

// ---------------------------------------------------------------- requests

function newName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function send(where, content) {
  const submission = newName();
  const unsent = { url: `${base}/${where}`, body: { ...content, submission } };
  localStorage.setItem(outbox + submission, JSON.stringify(unsent));
  await deliver(unsent);
}

async function deliver(unsent) {
  busy = true;
  middle.setAttribute("aria-busy", "true");
  for (let attempt = 0; ; attempt++) {
    const problem = await post(unsent);
    if (!problem) break;
    if (problem.final) {
      say(problem.text, true);
      break;
    }
    say(`Not saved yet: ${problem.text} This browser keeps it and sends it again.`, true);
    await new Promise((done) => {
      setTimeout(done, PAUSES[Math.min(attempt, PAUSES.length - 1)]);
      window.addEventListener("online", done, { once: true });
    });
  }
  busy = false;
  middle.removeAttribute("aria-busy");
}

// Resolves to null once the judgement is on disk, else to the problem and whether sending again is useless.
async function post(unsent) {
  let response, reply;
  try {
    response = await fetch(unsent.url, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(unsent.body),
      signal: AbortSignal.timeout(10000),
    });
    reply = await response.json();
  } catch {
    return { text: "no connection to the server." };
  }
  if (response.ok) {
    localStorage.removeItem(outbox + unsent.body.submission);
    say(reply.note);
    show(reply.html);
    return null;
  }
  const text = reply.error || "the server did not accept it.";
  if ([401, 404].includes(response.status)) return { text, final: true }; // stays in the outbox until the rater is let in again
  if ([410, 422].includes(response.status)) {
    localStorage.removeItem(outbox + unsent.body.submission);
    return { text, final: true };
  }
  return { text };
}

async function sendLeftovers() {
  for (const key of Object.keys(localStorage).filter((name) => name.startsWith(outbox))) {
    const unsent = JSON.parse(localStorage.getItem(key));
    if (!unsent || !unsent.url.startsWith(`${base}/`)) continue;
    say("Sending an earlier judgement that is not saved yet.", true);
    await deliver(unsent);
    say("The earlier judgement is saved now.");
  }
}

// New images came while the rater waited, perhaps in another window.
function announce() {
  say("New images are ready.");
  if (document.hidden) document.title = `● ${document.title}`;
}

async function poll() {
  if (middle.dataset.state !== "question" && !busy) {
    try {
      const response = await fetch(`${base}/next`, { signal: AbortSignal.timeout(10000) });
      const reply = await response.json();
      if (response.ok && !busy && middle.dataset.state !== "question") {
        if (reply.html.trim() !== poll.last) show(reply.html);
        say("");
        if (middle.dataset.state === "question") announce();
      } else if (reply.error) say(reply.error, true);
    } catch {
      say("No connection to the server; trying again.", true);
    }
  }
  setTimeout(poll, 2000);
}

// ---------------------------------------------------------------- keys and touches

function move(step) {
  const columns = Number(page.querySelector(".tiles").style.getPropertyValue("--columns")) || 1;
  const at = Math.max(0, images.indexOf(document.activeElement));
  const to = at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[step];
  if (images[to]) images[to].focus();
}

function press(event) {
  const { key } = event, pair = middle.dataset.mode === "pair", question = middle.dataset.state === "question";
  const lower = key.toLowerCase(), onImage = images.includes(document.activeElement);
  if (lower === "u") return undo();
  if (!question) return false;
  if (key === "?") return help();
  if (lower === "g") return guide();
  if (lower === "r") return report(Math.max(0, images.indexOf(document.activeElement)));
  if (/^[1-9]$/.test(key)) {
    if (images[key - 1]) images[key - 1].focus();
    return pick(key - 1);
  }
  if (key.startsWith("Arrow")) {
    if (!pair) return move(key);
    return key === "ArrowLeft" ? pick(0) : key === "ArrowRight" ? pick(1) : key === "ArrowDown" ? tie() : false;
  }
  if (lower === "t" && pair) return tie();
  if (lower === "b" && pair) return bothBad();
  if (lower === "s") return judge(null);
  if (lower === "z") return look(Math.max(0, images.indexOf(document.activeElement)));
  if (key === "Backspace") {
    if (middle.dataset.mode !== "rank" || !picked.length) return undo();
    picked.pop();
    return mark();
  }
  if (key === "Enter" && !pair && middle.dataset.mode !== "best" && (onImage || document.activeElement.tagName !== "BUTTON")) return save();
  return false;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (zoom.open) return zoomKey(event);
  if (document.querySelector("dialog[open]")) return;
  if (event.repeat && !event.key.startsWith("Arrow")) return event.preventDefault(); // a held key counts as one press
  if (event.repeat && middle.dataset.mode === "pair") return event.preventDefault();
  if (press(event) !== false) event.preventDefault();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || button.closest("dialog")) return;
  if (button.classList.contains("image")) return pick(Number(button.dataset.index));
  if (button.classList.contains("look")) return look(Number(button.dataset.index));
  const closer = () => look(Math.max(0, images.indexOf(lastFocus)));
  const act = { undo, save, skip: () => judge(null), tie, bad: bothBad, more: showMore, ask: help, guide, closer }[button.id];
  if (act) act();
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) document.title = middle.dataset.title;
  if (document.hidden) hiddenSince = performance.now();
  else if (hiddenSince !== null) {
    // Time in another window does not count, nor does time before the images were loaded.
    if (shownAt !== null) hiddenFor += performance.now() - Math.max(hiddenSince, shownAt);
    hiddenSince = null;
  }
});
document.addEventListener("focusin", (event) => { if (event.target.classList.contains("image")) lastFocus = event.target; });
new ResizeObserver(layOut).observe(page);

show();
page.dataset.ready = "";
sendLeftovers();
poll();
