// Adds liveness to a page that is whole without it: new events as they come, and the rest of the page anew after them.
// It only ever reads, and only from where the page came from.
"use strict";

(() => {
  const EVENTS_MS = 2000;      // between two looks for new events
  const REFRESH_MS = 15000;    // after which the page is read anew in any case
  const SOONEST_MS = 4000;     // between two such reads
  const MOST_ROWS = 500;       // in the table of events

  const made = document.getElementById("made");
  const words = document.getElementById("liveness");
  const rows = document.getElementById("event-rows");
  let refreshed = performance.now();
  let hasNews = false;

  function show(isLive) {
    if (!made) return;
    made.classList.toggle("live", isLive);
    made.classList.toggle("stale", !isLive);
    words.textContent = isLive ? "live, as of" : "cpmd does not answer; as of";
  }

  async function read(url) {
    const answer = await fetch(url, { cache: "no-store", credentials: "same-origin", redirect: "error" });
    if (!answer.ok) throw new Error(`${answer.status}`);
    return new DOMParser().parseFromString(await answer.text(), "text/html");
  }

  async function addEvents() {
    const page = await read(`event-rows?after=${encodeURIComponent(rows.dataset.after)}`);
    const fresh = [...page.querySelectorAll("tr[data-seq]")];
    if (!fresh.length) return;
    hasNews = true;
    rows.dataset.after = page.querySelector("tbody").dataset.after;
    rows.querySelectorAll("tr:not([data-seq])").forEach((row) => row.remove());
    fresh.forEach((row) => row.classList.add("new"));
    rows.prepend(...fresh.map((row) => document.adoptNode(row)));
    while (rows.children.length > MOST_ROWS) rows.lastElementChild.remove();
  }

  // Open details stay open, and what has the focus, or a selection of text in it, is left alone.
  function replace(old, fresh) {
    const isInUse = old.contains(document.activeElement) ||
      (!getSelection().isCollapsed && old.contains(getSelection().anchorNode));
    if (isInUse || old.outerHTML === fresh.outerHTML) return;
    const open = [...old.querySelectorAll("details")].map((each) => each.open);
    fresh.querySelectorAll("details").forEach((each, index) => { each.open = open[index] ?? false; });
    const scrolled = [...old.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
    old.replaceWith(document.adoptNode(fresh));
    fresh.querySelectorAll(".scroll").forEach((each, index) => { each.scrollLeft = scrolled[index] ?? 0; });
  }

  async function refresh() {
    refreshed = performance.now();
    hasNews = false;
    const page = await read(location.href);
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = page.getElementById(old.id);
      if (fresh) replace(old, fresh);
    }
    const time = page.querySelector("#made time");
    if (made && time) made.querySelector("time").textContent = time.textContent;
  }

  async function turn() {
    if (!document.hidden) {
      try {
        if (rows) await addEvents();
        const age = performance.now() - refreshed;
        if (age > REFRESH_MS || (hasNews && age > SOONEST_MS)) await refresh();
        show(true);
      } catch {
        show(false);
      }
    }
    setTimeout(turn, EVENTS_MS);
  }

  if (made) {
    show(true);
    setTimeout(turn, EVENTS_MS);
  }
})();
