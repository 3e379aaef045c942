// How many tokens an answer had, how fast they came, and how it ended: the line below its words.

export class Figures {
  constructor() {
    this.begin = null;
    this.tokens = 0;
    this.finish = null;
  }

  count(piece) {
    this.begin ??= piece.text ? performance.now() : null;
    this.finish = piece.finish ?? this.finish;
    this.tokens = piece.usage?.completion_tokens ?? this.tokens + piece.tokens.length;
    if (piece.text || piece.finish) this.end = performance.now();
  }

  words(text) {
    const said = [];
    if (this.tokens) said.push(`${this.tokens} token${this.tokens === 1 ? "" : "s"}`);
    const seconds = (this.end - this.begin) / 1000;
    if (this.tokens > 1 && seconds > 0.05) said.push(`${((this.tokens - 1) / seconds).toFixed(1)} tokens/s`);
    if (this.finish === "length") said.push("cut at the limit");
    if (this.finish === "stopped") said.push("stopped");
    if (!text && this.finish === "stop") said.push("an empty answer");
    return said.join(" · ");
  }
}
