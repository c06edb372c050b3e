// Makes the pages live: ages that tick, content that is refreshed in place, buttons that copy. Every page works without.
//
// What tests and other parts may rely on:
//   [data-live]      an element with an id whose content is refreshed; [data-active] on one of them: something runs
//   tr#run-<id>      a row of the list;  tbody#ep-<episode>  a checkpoint of a run's page;  a[data-sort=<column>]
//   [data-copy]      a button that copies this attribute's value; its [data-label] then says "Copied"
//   .command[data-program=trainer|mlflow][data-source=path|uri]  one form of a command; with [data-primary] in the head
//   #program-<p>, #source-<s>  the radio buttons that choose the form
//   time[data-age=ago|for|span]  a time that is shown as an age
//   [data-status]    where changes are announced;  [data-offline]  the banner of a server that does not answer
//   [data-connection]  "Live" or "Paused" in the top bar

const FAST = 5_000;
const SLOW = 30_000;
const COPIED_FOR = 2_000;
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

// ---- Ages

const UNITS = [["d", 86_400], ["h", 3_600], ["min", 60], ["s", 1]];

function length(seconds, parts) {
  let rest = Math.max(0, Math.floor(seconds));
  const at = UNITS.findIndex(([unit, worth]) => rest >= worth || unit === "s");
  const said = [];
  for (const [unit, worth] of UNITS.slice(at, at + parts)) {
    const count = Math.floor(rest / worth);
    if (count || !said.length) said.push(`${count} ${unit}`);
    rest -= count * worth;
  }
  return said.join(" ");
}

function tell(time) {
  const seconds = (Date.now() - Date.parse(time.dateTime)) / 1000;
  if (Number.isNaN(seconds)) return;
  const form = time.dataset.age;
  const text =
    form === "for" ? `for ${length(seconds, 1)}` : form === "span" ? length(seconds, 2) : seconds < 1 ? "just now" : `${length(seconds, 1)} ago`;
  if (time.textContent !== text) time.textContent = text;
}

const tick = () => $$("time[data-age]").forEach(tell);

// ---- Refreshing in place: nodes stay, so focus, scroll, selections and open details do

const OWN_STATE = new Set(["open", "checked", "hidden"]);

function sameKind(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && (a.id ?? "") === (b.id ?? "");
}

function morphAttributes(old, fresh) {
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !OWN_STATE.has(name) && !name.startsWith("data-own")) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    const own = OWN_STATE.has(name) || (name === "class" && old.hasAttribute("data-own-copied"));
    if (!own && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}

function morph(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE || old.isEqualNode(fresh)) return;
  morphAttributes(old, fresh);
  if (old.matches("input, select, textarea")) return;
  if (old.matches("time[data-age]")) return tell(old);
  if (old.matches("[data-label]") && old.closest("[data-own-copied]")) return;
  morphChildren(old, fresh);
}

function morphChildren(old, fresh) {
  const byId = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let at = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const known = wanted.id ? byId.get(wanted.id) : undefined;
    // An element that moved is fetched to its place; what is here and wanted later stays for later.
    if (known && known !== at) old.insertBefore(known, at);
    const candidate = known ?? at;
    if (candidate && sameKind(candidate, wanted)) {
      if (candidate === at) at = at.nextSibling;
      morph(candidate, wanted);
    } else {
      old.insertBefore(document.importNode(wanted, true), at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

const words = (root) => new Map($$("tr[id] .status, #head .status", root).map((s) => [s.closest("[id]").id, s.textContent.trim()]));

function apply(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  const before = words(document);
  const newest = newestCheckpoint();
  const focused = document.activeElement;
  const parts = $$("[data-live]");
  // A page of another shape, such as a list's that had no run: it is loaded anew where nobody has touched anything.
  const shape = (root) => $$("[data-live]", root).map((part) => part.id).join();
  if (shape(document) !== shape(fresh)) {
    if (!$$("main input:checked, main details[open]").some((own) => !own.defaultChecked)) location.reload();
    return;
  }
  const kept = placeOfReader();
  for (const part of parts) {
    const found = fresh.getElementById(part.id);
    if (found) morph(part, found);
  }
  document.title = fresh.title;
  // An element that was moved has lost it.
  if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
  tick();
  if (kept?.element.isConnected) scrollBy({ top: topOf(kept.element) - kept.top, behavior: "instant" });
  announce(before, words(document));
  if (newestCheckpoint() !== newest) say(`Checkpoint of episode ${newestCheckpoint()} was saved`);
  $$("[data-compare]").forEach(countChosen);
}

const topOf = (element) => element.getBoundingClientRect().top;

// What somebody reads must not be pushed away by what comes above it: where the focus is, else the first thing seen.
function placeOfReader() {
  if (scrollY === 0) return null;
  const seen = (element) => topOf(element) < innerHeight && element.getBoundingClientRect().bottom > 0;
  const focused = document.activeElement;
  const element = focused.matches("main *") && seen(focused) ? focused : $$("main [id], main h2").find((each) => topOf(each) >= 0 && seen(each));
  return element ? { element, top: topOf(element) } : null;
}

function newestCheckpoint() {
  return $(".saved tbody")?.id.replace("ep-", "");
}

function announce(before, after) {
  const news = [...after].filter(([id, word]) => before.get(id) !== word);
  if (!news.length) return;
  const said = news.slice(0, 3).map(([id, word]) => {
    const name = $(`#${CSS.escape(id)} .name, #${CSS.escape(id)} h1`)?.textContent.trim() ?? id;
    return before.has(id) ? `${name} is ${word} now` : `${name} is new: ${word}`;
  });
  say(said.join(". ") + (news.length > 3 ? `. ${news.length - 3} more changed` : ""));
}

function say(text) {
  const status = $("[data-status]");
  status.textContent = "";
  // A text that is put in anew is read anew, even the same.
  setTimeout(() => (status.textContent = text), 50);
}

// ---- Asking, only while somebody looks

let tag = null;
let timer = null;
let asking = false;

const isLive = () => $("main [data-live]") !== null;
const isActive = () => $("[data-active]") !== null;

async function ask() {
  if (asking || document.hidden) return;
  asking = true;
  clearTimeout(timer);
  let reached = true;
  try {
    const headers = { Accept: "text/html", ...(tag ? { "If-None-Match": tag } : {}) };
    const answer = await fetch(location.href.split("#")[0], { headers, cache: "no-store", signal: AbortSignal.timeout(20_000) });
    if (answer.status === 200) {
      apply(await answer.text());
      tag = answer.headers.get("ETag");
    } else if (answer.status !== 304) {
      tag = null;
      reached = answer.status === 503 && $("[data-problem]") !== null;
    }
  } catch {
    reached = false;
  } finally {
    asking = false;
  }
  connected(reached);
  timer = setTimeout(ask, reached && isActive() ? FAST : SLOW);
}

function connected(reached) {
  const banner = $("[data-offline]");
  if (banner.hidden !== reached) say(reached ? "Connected again" : "No connection to the Training History");
  banner.hidden = reached;
  const mark = $("[data-connection]");
  mark.hidden = false;
  const current = reached && !$("#banners .banner, [data-problem]");
  mark.textContent = current ? "Live" : reached ? "Waiting" : "Offline";
  mark.classList.toggle("is-off", !current);
}

// ---- Copying

async function copyText(text) {
  // Browsers give pages the clipboard on https and localhost alone.
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Not permitted: the old way may be.
    }
  }
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "unseen";
  area.readOnly = true;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  let done = false;
  try {
    done = document.execCommand("copy");
  } finally {
    area.remove();
    focused?.focus({ preventScroll: true });
  }
  return done;
}

async function copy(button) {
  const label = $("[data-label]", button);
  const done = await copyText(button.dataset.copy);
  button.dataset.ownLabel ??= label.textContent;
  button.setAttribute("data-own-copied", "");
  button.classList.toggle("is-done", done);
  label.textContent = done ? "Copied" : "Select it";
  say(done ? "Copied" : "The browser does not let this page copy: select the text");
  clearTimeout(button.ownTimer);
  button.ownTimer = setTimeout(() => {
    label.textContent = button.dataset.ownLabel;
    button.removeAttribute("data-own-copied");
    button.removeAttribute("data-own-label");
    button.classList.remove("is-done");
  }, COPIED_FOR);
}

// ---- Forms

function countChosen() {
  const button = $("[data-compare-button]");
  if (!button) return;
  const count = $$('input[name="run"]:checked').length;
  $("[data-label]", button).textContent = count ? `Compare ${count}` : "Compare";
  button.classList.toggle("primary", count >= 2 && count <= 8);
  $("[data-compare-hint]").textContent =
    count > 8 ? "At most 8 runs" : count === 1 ? "Choose one more" : count ? "" : "Choose 2 to 8 runs";
}

function submitShort(form) {
  // Addresses that people pass on: without what is not filtered.
  for (const field of $$("input, select", form)) {
    if (!field.value || (field.name === "sort" && field.value === "-started_at")) field.disabled = true;
  }
  setTimeout(() => $$("input, select", form).forEach((field) => (field.disabled = false)));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copy(button);
});
document.addEventListener("change", (event) => {
  if (event.target.matches("[data-filters] select")) event.target.form.requestSubmit();
  if (event.target.name === "run") countChosen();
});
document.addEventListener("submit", (event) => {
  if (event.target.matches("[data-filters]")) submitShort(event.target);
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && isLive()) ask();
});
addEventListener("online", () => isLive() && ask());
addEventListener("offline", () => isLive() && connected(false));
addEventListener("pageshow", (event) => {
  countChosen();
  if (event.persisted && isLive()) ask();
});

tick();
setInterval(() => document.hidden || tick(), 1_000);
if (isLive()) ask();
