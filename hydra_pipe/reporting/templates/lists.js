"use strict";
// Search, filter and sort of the lists, and more of them on asking. Without it everything is there, in the order that it came in.
for (const list of document.querySelectorAll("[data-list]")) {
  const form = list.querySelector("form.controls");
  if (!form) continue;
  const holder = list.querySelector("[data-items]");
  const items = [...holder.querySelectorAll("[data-item]")];
  const more = list.querySelector(".more");
  const step = Number(list.dataset.first);
  let order = items;
  let most = step;
  const chosen = (name) => (form.elements[name] ? form.elements[name].value : "");

  const update = () => {
    const search = chosen("search").trim().replace(/^#/, "");
    const isAsked = [search, chosen("label"), chosen("outcome")].some((value) => value !== "");
    const key = chosen("sort").replace("-", "");
    const sign = chosen("sort").startsWith("-") ? -1 : 1;
    const value = (item) => Number(item.dataset[key] || 0);
    const sorted = [...items].sort((a, b) => sign * (value(a) - value(b)) || a.dataset.order - b.dataset.order);
    let fitting = 0;
    let shown = 0;
    for (const item of sorted) {
      const { ids, label, outcome } = item.dataset;
      const isFound = (search) =>
        ids.split(" ").includes(search) || [...item.querySelectorAll("[data-key]")].some((of) => of.dataset.key.includes(search));
      const fits =
        (search === "" || isFound(search)) &&
        (chosen("label") === "" || chosen("label") === label) &&
        (chosen("outcome") === "" || chosen("outcome") === outcome);
      fitting += fits;
      item.hidden = !fits || (!isAsked && fitting > most);
      shown += !item.hidden;
      for (const row of item.querySelectorAll("[data-train]")) row.toggleAttribute("data-hit", row.dataset.train === search);
    }
    // moving everything is slow: only where something moves
    if (sorted.some((item, place) => item !== order[place])) holder.append(...sorted);
    order = sorted;
    more.hidden = shown === fitting;
    list.querySelector(".empty").hidden = fitting > 0;
    form.querySelector(".count").textContent = `${shown} of ${items.length} ${list.dataset.list}`;
  };

  more.querySelector("[data-more]").addEventListener("click", () => {
    const first = order.find((item) => item.hidden);
    most += step;
    update();
    if (first) first.querySelector("a, button, summary, [tabindex]")?.focus({ preventScroll: true });
  });
  list.addEventListener("reveal", () => {
    most = items.length;
    form.reset();
    update();
  });
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  form.hidden = false;
  update();
}

// Links between samples: from a training sample to the tests that it touches, and to a test that is not shown yet.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-find], a[href^='#test-'], a[href^='#group-']");
  if (!link) return;
  const form = document.querySelector("#tests form.controls");
  if (link.dataset.find && form) {
    form.reset();
    form.elements.search.value = link.dataset.find;
    form.dispatchEvent(new Event("input"));
  } else if (!link.dataset.find) {
    const card = document.querySelector(link.getAttribute("href"));
    if (card && card.hidden) card.closest("[data-list]").dispatchEvent(new Event("reveal"));
  }
});
