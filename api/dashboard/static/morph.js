// Makes one piece of a page like another, changing only what differs: what is open, chosen or focused stays so.
const kept = new Set(["open"]);

export function morph(now, then) {
  if (now.nodeType !== then.nodeType || now.nodeName !== then.nodeName) {
    now.replaceWith(then.cloneNode(true));
    return;
  }
  if (now.nodeType !== Node.ELEMENT_NODE) {
    if (now.data !== then.data) now.data = then.data;
    return;
  }
  if (now.isEqualNode(then) || now.hasAttribute("data-own")) return;
  for (const { name } of [...now.attributes]) if (!then.hasAttribute(name) && !kept.has(name)) now.removeAttribute(name);
  for (const { name, value } of then.attributes) if (now.getAttribute(name) !== value) now.setAttribute(name, value);
  if (now.nodeName === "INPUT" || now.nodeName === "SELECT" || now.nodeName === "TEXTAREA") return;
  children(now, then);
}

function children(now, then) {
  const byId = new Map();
  for (const child of now.children) if (child.id) byId.set(child.id, child);
  let place = now.firstChild;
  for (const wanted of [...then.childNodes]) {
    const known = wanted.id && byId.get(wanted.id);
    if (known) {
      if (known !== place) now.insertBefore(known, place);
      else place = place.nextSibling;
      morph(known, wanted);
    } else if (place && !place.id && !wanted.id && place.nodeName === wanted.nodeName) {
      const following = place.nextSibling;
      morph(place, wanted);
      place = following;
    } else {
      now.insertBefore(document.importNode(wanted, true), place);
    }
  }
  while (place) {
    const following = place.nextSibling;
    place.remove();
    place = following;
  }
}
