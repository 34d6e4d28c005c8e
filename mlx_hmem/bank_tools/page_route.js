"use strict";
// Routes a text as mlx_hmem does: the static encoder's word pieces (BERT's), their mean, a
// projection, and from the root of each tree to the nearest child (L2).
const Router = (() => {
  const WORDS = /[^ \t\n\r!-/:-@[-`{-~]+|[!-/:-@[-`{-~]/g;
  const MARK = /^[\p{P}!-/:-@[-`{-~]$/u;
  const CHINESE = [[0x4e00, 0x9fff], [0x3400, 0x4dbf], [0x20000, 0x2a6df], [0x2a700, 0x2b73f],
    [0x2b740, 0x2b81f], [0x2b920, 0x2ceaf], [0xf900, 0xfaff], [0x2f800, 0x2fa1f]];
  let own = null;

  function bytes(text) {
    const raw = atob(text);
    const result = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) result[i] = raw.charCodeAt(i);
    return result;
  }

  const floats = (text) => new Float32Array(bytes(text).buffer);

  function start(encoder) {
    const vocabulary = new Map(encoder.vocabulary.map((piece, id) => [piece, id]));
    own = {
      vocabulary, rank: encoder.rank, dim: encoder.dim, maxLength: encoder.max_length,
      maxCharacters: encoder.max_characters, unknown: vocabulary.get("[UNK]"),
      vectors: new Int8Array(bytes(encoder.vectors).buffer), scales: floats(encoder.scales),
      projection: floats(encoder.projection), bias: floats(encoder.bias),
      trees: encoder.trees.map((levels) => levels.map(floats)),
    };
  }

  function normalised(word) {
    let text = "";
    for (const c of word) {
      const code = c.codePointAt(0);
      if (code === 0xfffd || (/\p{C}/u.test(c) && !/\s/.test(c))) continue;
      const chinese = CHINESE.some(([first, last]) => first <= code && code <= last);
      text += /\s/u.test(c) ? " " : chinese ? ` ${c} ` : c;
    }
    text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
    return [...text].map((c) => c.toLowerCase()).join(""); // one by one: no final sigma
  }

  function splitAtMarks(text) {
    const parts = [];
    for (const run of text.split(/\s+/u)) {
      let part = "";
      for (const c of run) {
        if (!MARK.test(c)) { part += c; continue; }
        if (part) parts.push(part);
        parts.push(c);
        part = "";
      }
      if (part) parts.push(part);
    }
    return parts;
  }

  // What stands for a word that is not known: the letters of it that are.
  function knownLetters(letters) {
    const known = letters.map((c) => own.vocabulary.get(c)).filter((id) => id !== undefined);
    const ascii = letters.every((c) => c < "\x80");
    return known.length && !ascii ? known : [own.unknown];
  }

  function piecesOf(part) {
    const letters = [...part];
    if (letters.length > 100) return knownLetters(letters);
    const ids = [];
    for (let start = 0; start < letters.length;) {
      let end = letters.length, id;
      for (; end > start; end--) {
        id = own.vocabulary.get((start ? "##" : "") + letters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (end === start) return knownLetters(letters);
      ids.push(id);
      start = end;
    }
    return ids;
  }

  function ids(text) {
    const words = [...text].slice(0, own.maxCharacters).join("").match(WORDS) || [];
    return words.flatMap((w) => splitAtMarks(normalised(w)).flatMap(piecesOf)).slice(0, own.maxLength);
  }

  function vector(text) {
    const { rank, dim } = own, pooled = new Float64Array(rank), pieces = ids(text);
    for (const id of pieces) {
      for (let i = 0; i < rank; i++) pooled[i] += own.vectors[id * rank + i] * own.scales[id];
    }
    const result = Float64Array.from(own.bias);
    for (let i = 0; i < rank; i++) {
      const value = pieces.length ? pooled[i] / pieces.length : 0;
      for (let j = 0; j < dim; j++) result[j] += value * own.projection[i * dim + j];
    }
    const length = Math.max(Math.hypot(...result), 1e-12);
    return result.map((value) => value / length);
  }

  // The path of a vector in the tree of a bank, as far down as the page has its centroids, and the
  // cosine of the last cluster that may be fetched.
  function route(bank, number, unit, barred) {
    const path = [], trees = own.trees[number];
    let nearness = -2, open = true;
    for (let level = 0; level < trees.length; level++) {
      const { ids: clusters, examples } = bank.levels[level], rows = trees[level];
      let best = -1, least = Infinity;
      for (let row = 0; row < clusters.length; row++) {
        if (!examples[row]) continue; // no text reaches it
        if (level && Math.floor(clusters[row] / bank.branching[level]) !== path[level - 1]) continue;
        let distance = 0;
        for (let i = 0; i < own.dim; i++) distance += (rows[row * own.dim + i] - unit[i]) ** 2;
        if (distance < least) [best, least] = [row, distance];
      }
      path.push(clusters[best]);
      open = open && !barred.has(`${level + 1}.${clusters[best]}`);
      if (!open || !bank.r[level]) continue;
      let dot = 0, squares = 0;
      for (let i = 0; i < own.dim; i++) {
        const value = rows[best * own.dim + i];
        dot += value * unit[i];
        squares += value * value;
      }
      nearness = squares ? dot / Math.sqrt(squares) : -1;
    }
    return { path, nearness };
  }

  return { start, ids, vector, route, get ready() { return own !== null; } };
})();
