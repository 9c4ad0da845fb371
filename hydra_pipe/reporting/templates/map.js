// The map: a point that is tapped, or walked to, shows its sample.
for (const part of document.querySelectorAll("#map")) {
  const plane = part.querySelector(".plane");
  const svg = plane.querySelector("svg");
  const here = svg.querySelector(".here");
  const picked = part.querySelector(".picked");
  const points = [];
  for (const path of svg.querySelectorAll("path.points")) {
    const ids = path.dataset.ids.split(" ");
    const isDoubted = path.classList.contains("doubted");
    for (const [place, point] of [...path.getAttribute("d").matchAll(/M(\d+) (\d+)/g)].entries())
      points.push({ id: ids[place], label: path.dataset.label, isDoubted, x: Number(point[1]), y: Number(point[2]) });
  }
  points.sort((a, b) => b.isDoubted - a.isDoubted || a.x - b.x);
  let at = -1;

  const show = (place) => {
    if (place < 0 || place >= points.length) return;
    at = place;
    const { id, label, isDoubted, x, y } = points[place];
    here.setAttribute("cx", x);
    here.setAttribute("cy", y);
    here.removeAttribute("hidden");
    const title = document.createElement("p");
    title.textContent = `Sample #${id}, labelled ${label}${isDoubted ? ": looks wrong" : ""}`;
    picked.replaceChildren(title);
    const known = [...document.querySelectorAll(`[data-sample="${id}"], li[data-train="${id}"]`)];
    const own = known.map((item) => item.querySelector(".picture, .passage, .cells, .long")).find((found) => found);
    if (own) picked.append(own.cloneNode(true));
    const doubt = known.find((item) => item.matches("[data-doubt]"));
    if (doubt) {
      const more = document.createElement("p");
      more.append("suggested: ", doubt.querySelector(".change strong").textContent);
      picked.append(more);
    }
  };

  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let nearest = 0;
    const far = (point) => (point.x - x) ** 2 + (point.y - y) ** 2;
    for (const place of points.keys()) if (far(points[place]) < far(points[nearest])) nearest = place;
    show(nearest);
  });
  plane.addEventListener("keydown", (event) => {
    if (["ArrowRight", "ArrowDown"].includes(event.key)) show(at + 1);
    else if (["ArrowLeft", "ArrowUp"].includes(event.key)) show(at - 1);
    else return;
    event.preventDefault();
  });
  part.querySelector(".keys").hidden = false;
}
