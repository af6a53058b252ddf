// Change one DOM tree into another by changing only what differs. Focus, selections and open details are preserved.
export function morph(current, target) {
  if (current.nodeType !== target.nodeType || current.nodeName !== target.nodeName) {
    current.replaceWith(target.cloneNode(true));
    return;
  }
  if (current.nodeType !== Node.ELEMENT_NODE) {
    if (current.data !== target.data) current.data = target.data;
    return;
  }
  if (current.isEqualNode(target) || current.hasAttribute("data-morph-ignore")) return;
  for (const { name } of [...current.attributes]) {
    if (!target.hasAttribute(name) && name !== "open") current.removeAttribute(name);
  }
  for (const { name, value } of target.attributes) {
    if (current.getAttribute(name) !== value) current.setAttribute(name, value);
  }
  if (["INPUT", "SELECT", "TEXTAREA"].includes(current.nodeName)) return;
  morphChildren(current, target);
}

function morphChildren(current, target) {
  const byId = new Map();
  for (const child of current.children) if (child.id) byId.set(child.id, child);
  let cursor = current.firstChild;
  for (const targetChild of [...target.childNodes]) {
    const match = targetChild.id && byId.get(targetChild.id);
    if (match) {
      if (match !== cursor) current.insertBefore(match, cursor);
      else cursor = cursor.nextSibling;
      morph(match, targetChild);
    } else if (cursor && !cursor.id && !targetChild.id && cursor.nodeName === targetChild.nodeName) {
      const next = cursor.nextSibling;
      morph(cursor, targetChild);
      cursor = next;
    } else {
      current.insertBefore(document.importNode(targetChild, true), cursor);
    }
  }
  while (cursor) {
    const next = cursor.nextSibling;
    cursor.remove();
    cursor = next;
  }
}
