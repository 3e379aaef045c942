// An answer's words, token by token: shaded by how sure the model was, with what else it might have said.
//
// The text is what the server calls the text; tokens are laid along it, and where they don't fit it (an end token that
// has no text, the half of a character, a text cut at a stop string) the text stands without shade. So a fault in the
// log-probabilities can't change a word of the answer. Everything becomes a text node: no HTML is ever made of it.
//
// Pieces come faster than a long paragraph can be laid out (a span per token: 4,000 of them took minutes when each was
// shown by itself). So they are gathered, and `show` puts them on the page: once per frame, or less often where that
// takes long, since the model may be computed on the same cores.

const told = new WeakMap();  // a token's element -> the token
const SHOWN = 5;

export class Words {
  constructor(element) {
    this.element = element;
    this.gathered = new DocumentFragment();
    this.text = "";
    this.begun = false;  // whether a token is marked
    this.waiting = "";  // text that no token is laid on as yet
    this.tokens = [];  // tokens that lie on no text as yet
    this.decoder = new TextDecoder();
    this.joint = 0;  // log-probability of tokens before, which had no whole character
  }

  add({ text, tokens }) {
    this.text += text;
    this.waiting += text;
    this.tokens.push(...tokens.map((token) => this.whole(token)).filter(Boolean));
    while (this.waiting && this.tokens.length) {
      const token = this.tokens[0];
      const words = this.starts(token.text);
      if (words === null && token.text.startsWith(this.waiting)) break;  // the rest of its text is to come
      this.tokens.shift();
      if (words !== null) this.mark(words, token);
    }
    if (!this.tokens.length) this.plain();
  }

  show() {
    this.element.append(this.gathered);
  }

  end() {
    this.plain();
    this.show();
  }

  /** The token with the characters that its bytes make whole; nothing for one that makes none. */
  whole(token) {
    if (!token.bytes) return token;
    const text = this.decoder.decode(new Uint8Array(token.bytes), { stream: true });
    const logprob = token.logprob + this.joint;
    const first = this.joint === 0;
    this.joint = text ? 0 : logprob;
    return text ? { ...token, text, logprob, top: first ? token.top : [] } : null;
  }

  /** What of the waiting text is this token's. The answer's first blank may have been left out of the text. */
  starts(words) {
    if (words && this.waiting.startsWith(words)) return words;
    const trimmed = words.trimStart();
    const first = this.waiting.length === this.text.length;
    return first && trimmed && this.waiting.startsWith(trimmed) ? trimmed : null;
  }

  mark(words, token) {
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = words;
    span.tabIndex = this.begun ? -1 : 0;
    this.begun = true;
    span.style.setProperty("--unsure", (1 - Math.exp(token.logprob)).toFixed(3));
    told.set(span, token);
    this.gathered.append(span);
    this.waiting = this.waiting.slice(words.length);
  }

  plain() {
    if (this.waiting) this.gathered.append(this.waiting);
    this.waiting = "";
  }
}

/** One tip for all tokens of `root`: by pointer, by touch, and by the arrow keys from an answer's first token. */
export function explain(root, tip) {
  const wanted = () => !root.classList.contains("bare");
  let shown = null;
  const show = (target) => {
    const token = told.get(target);
    if (!token || !wanted()) return hide();
    fill(tip, token);
    tip.hidden = false;
    shown = target;
    place(tip, target);
    target.setAttribute("aria-describedby", tip.id);
  };
  const hide = () => {
    tip.hidden = true;
  };
  root.addEventListener("pointerover", (event) => show(event.target));
  root.addEventListener("pointerleave", hide);
  root.addEventListener("focusin", (event) => show(event.target));
  root.addEventListener("focusout", hide);
  root.addEventListener("keydown", (event) => {
    if (!told.has(event.target) || !wanted()) return;
    if (event.key === "Escape") hide();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [...event.target.parentElement.querySelectorAll(".token")];
    const next = all[all.indexOf(event.target) + step];
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  // It goes along: moving to a token by the keys may itself scroll.
  addEventListener("scroll", () => tip.hidden || place(tip, shown), { passive: true, capture: true });
}

function fill(tip, token) {
  const list = document.createElement("ol");
  const top = token.top.slice(0, SHOWN);
  const own = top.find((other) => other.text === token.text) ?? { text: token.text, logprob: token.logprob };
  for (const other of top.includes(own) ? top : [...top, own]) {
    const row = document.createElement("li");
    if (other === own) row.className = "own";
    const words = document.createElement("span");
    words.className = "seen";
    words.textContent = seen(other.text);
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.setProperty("--part", Math.exp(other.logprob).toFixed(4));
    const figure = document.createElement("span");
    figure.className = "figure";
    figure.textContent = percent(Math.exp(other.logprob));
    row.append(words, bar, figure);
    list.append(row);
  }
  tip.replaceChildren(list);
}

function seen(words) {
  return words.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

function percent(part) {
  if (part > 0.9995) return part === 1 ? "100 %" : "> 99.9 %";
  return part < 0.001 ? "< 0.1 %" : `${(100 * part).toFixed(1)} %`;
}

/** Above the token where there is room, else below, and always within the window. */
function place(tip, target) {
  const token = target.getClientRects()[0];
  const { width, height } = tip.getBoundingClientRect();
  const gap = 8;
  const left = Math.max(gap, Math.min(token.left, innerWidth - width - gap));
  const above = token.top - height - gap;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > gap ? above : token.bottom + gap}px`;
}
