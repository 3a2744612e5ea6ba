// Times in the reader's zone, the figures under the pointer, and the page anew every few seconds: the contents of <main>
// are replaced, and scroll, focus and open details stay. Without this script the page says UTC, and reloads itself.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const main = byId("main"), stale = byId("stale"), pause = byId("pause");
  const form = (options) => new Intl.DateTimeFormat(undefined, options);
  const clock = { hour: "2-digit", minute: "2-digit", second: "2-digit" };
  const date = { month: "short", day: "numeric" };
  const minute = form({ hour: "2-digit", minute: "2-digit" }), day = form({ weekday: "short", day: "numeric" });
  const second = form(clock), far = form({ ...date, ...clock }), step = form({ ...date, hour: "2-digit", minute: "2-digit" });
  const whole = form({ dateStyle: "full", timeStyle: "long" });
  const isToday = (at) => at.toDateString() === new Date().toDateString();

  const words = (at, named) => {
    if (named === "day") return day.format(at);
    if (named === "minute") return minute.format(at);
    if (named === "step") return isToday(at) ? minute.format(at) : step.format(at);
    return isToday(at) ? second.format(at) : far.format(at);
  };
  const localise = (root) => {
    for (const time of root.querySelectorAll("time")) {
      const at = new Date(time.dateTime);
      time.textContent = words(at, time.dataset.form);
      time.title = whole.format(at);
    }
  };

  // The first of the parts that the reader sees: it stays in its place when others grow above it.
  const parts = () => [...main.querySelectorAll(".card[id]")];
  const replace = (fresh) => {
    const focused = main.contains(document.activeElement) ? document.activeElement : null;
    const open = [...main.querySelectorAll("details[open]")].map((each) => each.id);
    const scrolled = [...main.querySelectorAll(".scroll")].map((each) => [each.id, each.scrollLeft, each.scrollTop]);
    const anchor = window.scrollY > 0 ? parts().find((each) => each.getBoundingClientRect().bottom > 0) : null;
    const top = anchor ? anchor.getBoundingClientRect().top : 0;
    localise(fresh);
    for (const each of fresh.querySelectorAll("details")) each.open = open.includes(each.id);
    main.replaceChildren(...fresh.childNodes);
    main.dataset.every = fresh.dataset.every;
    for (const [id, left, down] of scrolled) byId(id)?.scrollTo(left, down);
    if (focused && focused !== main) (byId(focused.id) ?? main).focus({ preventScroll: true });
    const now = anchor && byId(anchor.id);
    if (now) window.scrollBy({ top: now.getBoundingClientRect().top - top, behavior: "instant" });
  };

  let busy = false, paused = false, timer = 0;
  const isReading = () => {
    const selection = getSelection();
    return !selection.isCollapsed && main.contains(selection.anchorNode);
  };
  const refresh = async () => {
    if (busy || paused || document.hidden || isReading()) return;
    busy = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store", redirect: "manual", signal: AbortSignal.timeout(15000) });
      if (!answer.ok) throw new Error(answer.status ? `it answers ${answer.status}` : "it wants a new login");
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("main");
      if (!fresh) throw new Error("it answers with another page");
      const before = byId("headline").textContent;
      replace(fresh);
      document.title = page.title;
      byId("tab-icon").setAttribute("href", page.getElementById("tab-icon").getAttribute("href"));
      const seen = document.querySelector(".fresh time");
      seen.dateTime = fresh.dataset.at;
      localise(seen.parentNode);
      if (byId("headline").textContent !== before) byId("announce").textContent = byId("headline").textContent;
      stale.hidden = true;
    } catch (error) {
      const why = error.name === "Error" ? error.message : "it does not answer";
      const seen = document.querySelector(".fresh time").textContent;
      const said = `This page is as old as ${seen}. The site cannot be asked: ${why}.`;
      if (stale.hidden || stale.textContent !== said) stale.textContent = said;
      stale.hidden = false;
    } finally {
      busy = false;
    }
  };
  const again = () => {
    clearTimeout(timer);
    timer = setTimeout(() => refresh().finally(again), 1000 * Number(main.dataset.every));
  };

  // The figures of the step under the pointer stand in the table below the chart, the oldest first.
  main.addEventListener("pointermove", (event) => {
    const lines = event.target.closest?.(".lines");
    for (const other of main.querySelectorAll(".cursor[d*=M]")) if (other.parentNode !== lines) clear(other);
    if (!lines) return;
    const box = lines.getBoundingClientRect(), rows = lines.closest("figure").querySelectorAll("tbody tr");
    const n = Math.min(rows.length - 1, Math.max(0, Math.floor((rows.length * (event.clientX - box.left)) / box.width)));
    const { width, height } = lines.viewBox.baseVal;
    lines.querySelector(".cursor").setAttribute("d", `M${(width * (n + 0.5)) / rows.length} 0V${height}`);
    lines.closest("figure").querySelector("output").textContent = [...rows[n].cells].map((cell) => cell.textContent).join(" · ");
  });
  main.addEventListener("pointerleave", () => main.querySelectorAll(".cursor").forEach(clear));
  const clear = (cursor) => {
    cursor.setAttribute("d", "");
    cursor.closest("figure").querySelector("output").textContent = "";
  };

  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    if (!paused) refresh();
  });
  document.addEventListener("visibilitychange", () => refresh());
  byId("zone").textContent = Intl.DateTimeFormat().resolvedOptions().timeZone ?? "";
  localise(document);
  again();
})();
