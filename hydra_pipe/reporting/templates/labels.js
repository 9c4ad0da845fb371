// The queue of labels: decisions by mouse and by keyboard, kept in the browser, downloaded as CSV.
for (const queue of document.querySelectorAll("#labels")) {
  const items = [...queue.querySelectorAll("[data-doubt]")];
  if (!items.length) continue;
  const key = `hydra-pipe decisions ${queue.dataset.run}`;
  const step = Number(queue.dataset.first);
  const download = queue.querySelector("a[download]");
  const more = queue.querySelector(".more");
  const template = queue.querySelector("template").content.querySelector(".choices");
  const classes = [...template.querySelectorAll("option")];
  for (const option of classes.slice(1)) option.remove(); // each list of classes is made when it is asked for
  for (const item of items) {
    const choices = template.cloneNode(true);
    choices.setAttribute("aria-label", `Decision on sample ${item.dataset.id}`);
    choices.querySelector("bdi").textContent = item.querySelector("strong").textContent.slice(0, 16);
    choices.querySelector("select")?.setAttribute("aria-label", `Another label for sample ${item.dataset.id}`);
    item.append(choices);
  }
  let most = step;
  let isKept = true;
  // Sample -> [decision, label]. A decision on a sample that the page lacks stays as it is.
  let decisions = {};
  try {
    const found = JSON.parse(localStorage.getItem(key) || "{}");
    for (const [sample, pair] of Object.entries(found))
      if (/^\d+$/.test(sample) && Array.isArray(pair) && ["keep", "relabel", "drop"].includes(pair[0])) decisions[sample] = pair;
  } catch {
    isKept = false;
  }

  const csv = () => {
    const rank = new Map(items.map((item, place) => [item.dataset.id, place]));
    const place = (sample) => (rank.has(sample) ? rank.get(sample) : items.length);
    const samples = Object.keys(decisions).sort((a, b) => place(a) - place(b) || a - b);
    const rows = samples.map((sample) => `${sample},${decisions[sample][0]},${decisions[sample][0] === "relabel" ? decisions[sample][1] : ""}`);
    return ["sample,decision,label", ...rows, ""].join("\n");
  };

  const draw = () => {
    for (const [place, item] of items.entries()) {
      const [decision, label] = decisions[item.dataset.id] || [];
      item.hidden = place >= most;
      item.dataset.decision = decision || "";
      const isOther = decision === "relabel" && String(label) !== item.dataset.class;
      for (const button of item.querySelectorAll("[data-decision]"))
        button.setAttribute("aria-pressed", String(button.dataset.decision === decision && !isOther));
      const select = item.querySelector("select");
      if (!select) continue;
      if (isOther) offer(select);
      select.value = isOther ? String(label) : "";
      select.toggleAttribute("data-chosen", isOther);
    }
    const n = Object.keys(decisions).length;
    const of = (what) => Object.values(decisions).filter(([decision]) => decision === what).length;
    queue.querySelector(".decided .count").textContent =
      `${n} decided: ${of("keep")} kept, ${of("relabel")} relabelled, ${of("drop")} dropped` +
      (isKept ? "" : ". This browser keeps nothing: download before you close the page");
    for (const after of [download, queue.querySelector("[data-clear]")]) after.hidden = n === 0;
    download.href = `data:text/csv;charset=utf-8,${encodeURIComponent(csv())}`;
    const left = items.length - most;
    more.hidden = left <= 0;
    more.firstElementChild.textContent = `Show ${Math.min(step, left)} more of ${items.length}`;
  };

  const offer = (select) => {
    if (select.options.length === 1) select.append(...classes.slice(1).map((option) => option.cloneNode(true)));
  };

  const decide = (item, decision, label) => {
    if (decision === "") delete decisions[item.dataset.id];
    else decisions[item.dataset.id] = decision === "relabel" ? [decision, Number(label)] : [decision, ""];
    try {
      localStorage.setItem(key, JSON.stringify(decisions));
    } catch {
      isKept = false;
    }
    draw();
  };

  const focus = (place) => {
    if (place < 0 || place >= items.length) return;
    if (place >= most) {
      most += step;
      draw();
    }
    for (const item of items) item.tabIndex = -1;
    items[place].tabIndex = 0;
    items[place].focus();
    items[place].scrollIntoView({ block: "nearest" });
  };

  queue.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-decision]");
    if (!button) return;
    const item = button.closest("[data-doubt]");
    decide(item, button.getAttribute("aria-pressed") === "true" ? "" : button.dataset.decision, item.dataset.class);
  });
  queue.addEventListener("focusin", (event) => {
    if (event.target.matches("select")) offer(event.target);
    const item = event.target.closest("[data-doubt]");
    if (item) for (const other of items) other.tabIndex = other === item ? 0 : -1;
  });
  queue.addEventListener("change", (event) => {
    if (!event.target.matches("[data-doubt] select")) return;
    const item = event.target.closest("[data-doubt]");
    if (event.target.value === "") decide(item, "", "");
    else decide(item, "relabel", event.target.value);
  });
  queue.addEventListener("keydown", (event) => {
    const item = event.target.closest("[data-doubt]");
    if (!item || event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const place = items.indexOf(item);
    const by = { 1: "keep", 2: "relabel", 3: "drop", 0: "" }[event.key];
    if (["j", "ArrowDown", "ArrowRight"].includes(event.key)) focus(place + 1);
    else if (["k", "ArrowUp", "ArrowLeft"].includes(event.key)) focus(place - 1);
    else if (event.key === "o") item.querySelector("select")?.focus();
    else if (by !== undefined) {
      decide(item, by, item.dataset.class);
      if (by !== "") focus(place + 1);
    } else return;
    event.preventDefault();
  });
  more.addEventListener("click", () => {
    const first = most;
    most += step;
    draw();
    focus(first);
  });
  queue.querySelector("[data-clear]").addEventListener("click", () => {
    decisions = {};
    try {
      localStorage.removeItem(key);
    } catch {
      isKept = false;
    }
    draw();
  });

  for (const part of queue.querySelectorAll(".decided, .keys")) part.hidden = false;
  items[0].tabIndex = 0;
  for (const item of items.slice(1)) item.tabIndex = -1;
  draw();
}
