// What the pages do beyond what the server draws: copy, show ages, and follow what changes.
//
// The pages tell it by attributes:
//   data-copy="text"         a button that copies the text
//   data-label               inside of it, the words that become "Copied"
//   time[data-age]           is shown as an age; without a script it shows the time itself
//   time[data-span]          is shown as the time since then
//   main[data-live]          is fetched again every few seconds and brought up to date in place
//   [data-status][data-name] a change of the status is announced
//   data-submit-on-change    a form that is sent when a choice in it changes
//   data-retry               the page is loaded again when the server answers
const SECONDS = 5;
const MOST_SECONDS = 30;
const status = document.getElementById("status");

// Ages.

function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  const hours = Math.floor(seconds / 3600);
  if (hours < 24) return `${hours} h ${String(Math.floor((seconds % 3600) / 60)).padStart(2, "0")} min`;
  return hours < 240 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${Math.floor(hours / 24)} d`;
}

function tick() {
  for (const time of document.querySelectorAll("time[data-age], time[data-span]")) {
    const seconds = (Date.now() - Date.parse(time.dateTime)) / 1000;
    // A clock that is a little ahead of the server's says "now".
    const shown = "span" in time.dataset ? duration(Math.max(0, seconds)) : seconds < 1 ? "now" : `${duration(seconds)} ago`;
    if (time.textContent !== shown) time.textContent = shown;
  }
}

// Copying.

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // There is no clipboard for pages that did not come over https or from this machine.
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("readonly", "");
    area.className = "hidden";
    document.body.append(area);
    const focused = document.activeElement;
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus({ preventScroll: true });
    return copied;
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const label = button.querySelector("[data-label]");
  button.dataset.before ??= label.textContent;
  const copied = await copy(button.dataset.copy);
  label.textContent = copied ? "Copied" : "Select and copy it";
  button.classList.toggle("is-copied", copied);
  say(copied ? "Copied" : "It could not be copied: select the text and copy it");
  clearTimeout(button.timer);
  button.timer = setTimeout(() => {
    label.textContent = button.dataset.before;
    delete button.dataset.before;
    button.classList.remove("is-copied");
  }, 2000);
});

function say(words) {
  // Emptied first: the same words twice are two messages.
  status.textContent = "";
  requestAnimationFrame(() => { status.textContent = words; });
}

// Filters and choices.

document.addEventListener("change", (event) => {
  const form = event.target.closest("form[data-submit-on-change]");
  if (form && event.target.matches("select")) form.requestSubmit();
  if (event.target.matches('input[name="run"]')) count();
});

document.addEventListener("submit", (event) => {
  // What is empty is left out of the address.
  for (const field of event.target.querySelectorAll("input, select")) if (!field.value) field.disabled = true;
  setTimeout(() => { for (const field of event.target.querySelectorAll(":disabled")) field.disabled = false; });
});

function count() {
  const button = document.querySelector("button.compare");
  if (!button) return;
  const chosen = document.querySelectorAll('input[name="run"]:checked').length;
  button.textContent = chosen ? `Compare ${chosen}` : "Compare";
  button.disabled = chosen < 2 || chosen > 8;
}

// Following: the new page is brought into the old one node by node, so that scroll, focus, selection, what is open and
// what is chosen stay as they are.

const KEPT = new Set(["open", "checked", "value", "disabled"]);

function same(one, other) {
  return one.nodeType === other.nodeType && one.nodeName === other.nodeName && (one.id ?? "") === (other.id ?? "");
}

function bring(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) return;
  const busy = old.dataset && "before" in old.dataset;
  const ticking = old.matches("time[data-age], time[data-span]");
  const changed = ticking && old.dateTime !== fresh.dateTime;
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !KEPT.has(name) && !(busy && /^(class|data-before)$/.test(name))) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    const kept = KEPT.has(name) && !(name === "value" && old.matches("progress, button, option"));
    if (!kept && !(busy && name === "class") && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (busy || (ticking && !changed)) return;
  bringChildren(old, fresh);
}

function bringChildren(old, fresh) {
  const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let here = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const known = wanted.id ? named.get(wanted.id) : null;
    if (known && known !== here) {
      // Moved only if it stands elsewhere: a node that is moved loses the focus.
      old.insertBefore(known, here);
      here = known;
    }
    if (here && same(here, wanted)) {
      bring(here, wanted);
      here = here.nextSibling;
    } else if (here && !here.id && !wanted.id && here.nodeType === wanted.nodeType) {
      const next = here.nextSibling;
      old.replaceChild(document.importNode(wanted, true), here);
      here = next;
    } else {
      old.insertBefore(document.importNode(wanted, true), here);
    }
  }
  while (here) {
    const next = here.nextSibling;
    here.remove();
    here = next;
  }
}

function statuses() {
  return new Map([...document.querySelectorAll("[data-status][data-name]")].map((e) => [e.id, [e.dataset.name, e.dataset.status]]));
}

let tag = null;
let wait = SECONDS;
let timer = null;
let shownAt = new Date();
let asking = false;

async function follow() {
  const main = document.querySelector("main[data-live]");
  const retry = document.querySelector("[data-retry]");
  if (asking || document.hidden || !(main || retry)) return;
  asking = true;
  try {
    const answer = await fetch(location.href.split("#")[0], { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (retry && answer.ok) return location.reload();
    if (answer.status !== 304 && !answer.ok) throw new Error(answer.statusText);
    if (answer.status === 200) show(await answer.text(), answer.headers.get("ETag"));
    shownAt = new Date();
    offline(false);
    wait = document.querySelector(".status.is-running, .status.is-stalled, .banner.bad") ? SECONDS : Math.min(MOST_SECONDS, wait + SECONDS);
  } catch {
    offline(true);
    wait = Math.min(MOST_SECONDS, wait + SECONDS);
  } finally {
    asking = false;
    clearTimeout(timer);
    timer = setTimeout(follow, wait * 1000);
  }
}

function show(text, fresh) {
  const page = new DOMParser().parseFromString(text, "text/html");
  const before = statuses();
  bring(document.querySelector("main"), page.querySelector("main"));
  outage(page.getElementById("outage"));
  document.title = page.title;
  tag = fresh;
  tick();
  count();
  const changes = [...statuses()].filter(([id, [, now]]) => before.has(id) && before.get(id)[1] !== now);
  if (changes.length) say(changes.map(([, [name, now]]) => `${name} is ${now}`).join(", "));
}

function outage(fresh) {
  const old = document.getElementById("outage");
  if (old && fresh) bring(old, fresh);
  else if (fresh) document.querySelector(".banners").append(document.importNode(fresh, true));
  else old?.remove();
}

function offline(is) {
  const banner = document.getElementById("offline");
  if (banner.hidden !== is) return;
  banner.hidden = !is;
  document.getElementById("offline-since").textContent = is ? `at ${shownAt.toLocaleTimeString()}` : "";
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) { wait = SECONDS; follow(); }
});
window.addEventListener("online", () => { wait = SECONDS; follow(); });

tick();
count();
setInterval(tick, 1000);
timer = setTimeout(follow, SECONDS * 1000);
