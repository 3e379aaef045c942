// The page's elements, by their names in index.html.

export const at = (id) => document.getElementById(id);

/** A copy of a template. */
export const made = (id) => at(id).content.firstElementChild.cloneNode(true);

/** Whoever reads at the page's end stays there as it grows. */
export function keepLow(change) {
  const low = innerHeight + scrollY >= document.documentElement.scrollHeight - 60;
  change();
  if (low) scrollTo({ top: document.documentElement.scrollHeight });
}

export function notice(words) {
  at("notice").textContent = words;
  at("notice").hidden = !words;
}
