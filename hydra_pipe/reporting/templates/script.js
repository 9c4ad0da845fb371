"use strict";
// Search, filter and sort of the lists. Without it everything is there, in the order that it came in.
for (const list of document.querySelectorAll("[data-list]")) {
  const form = list.querySelector("form.controls");
  if (!form) continue;
  const holder = list.querySelector("[data-items]");
  const items = [...holder.querySelectorAll("[data-item]")];
  let order = items;
  const chosen = (name) => (form.elements[name] ? form.elements[name].value : "");

  const update = () => {
    const search = chosen("search").trim().replace(/^#/, "");
    let shown = 0;
    for (const item of items) {
      const { ids, label, outcome } = item.dataset;
      const fits =
        (search === "" || ids.split(" ").includes(search)) &&
        (chosen("label") === "" || chosen("label") === label) &&
        (chosen("outcome") === "" || chosen("outcome") === outcome);
      item.hidden = !fits;
      shown += fits;
      for (const row of item.querySelectorAll("[data-train]")) row.toggleAttribute("data-hit", row.dataset.train === search);
    }
    const key = chosen("sort").replace("-", "");
    const sign = chosen("sort").startsWith("-") ? -1 : 1;
    const value = (item) => Number(item.dataset[key] || 0);
    const sorted = [...items].sort((a, b) => sign * (value(a) - value(b)) || a.dataset.order - b.dataset.order);
    // moving everything is slow: only where something moves
    if (sorted.some((item, place) => item !== order[place])) holder.append(...sorted);
    order = sorted;
    list.querySelector(".empty").hidden = shown > 0;
    form.querySelector(".count").textContent = `${shown} of ${items.length} ${list.dataset.list}`;
  };

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  form.hidden = false;
  update();
}
