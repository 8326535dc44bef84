// The titles of marks at once, by mouse, touch or keyboard; without this script browsers show them after a moment.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

for (const title of document.querySelectorAll("svg title")) {
  const shape = title.parentNode;
  shape.dataset.tip = title.textContent;
  shape.setAttribute("aria-label", title.textContent);
  if (shape.classList.contains("mark") && !shape.classList.contains("faint")) shape.setAttribute("tabindex", "0");
  title.remove();
}

function show(event) {
  const shape = event.target.closest?.("[data-tip]");
  tip.hidden = !shape;
  if (!shape) return;
  tip.textContent = shape.dataset.tip;
  const place = shape.getBoundingClientRect();
  const left = place.left + place.width / 2 - tip.offsetWidth / 2;
  const above = place.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${above > 4 ? above : place.bottom + 8}px`;
}

for (const name of ["pointerover", "focusin", "click"]) document.addEventListener(name, show);
document.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
