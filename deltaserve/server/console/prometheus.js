// Prometheus's text format: as much of it as charts need.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)(?: \d+)?$/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)",?/g;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

// name -> [{labels, value}]
export function parse(source) {
  const found = new Map();
  for (const line of source.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (match === null) continue;
    const [, name, inside, number] = match;
    const labels = {};
    for (const [, label, value] of (inside ?? "").matchAll(LABEL)) {
      labels[label] = value.replace(/\\(.)/g, (_, letter) => ESCAPES[letter] ?? letter);
    }
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels, value: parseNumber(number) });
  }
  return found;
}

function parseNumber(text) {
  return text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);
}

export function sum(metrics, name, where = {}) {
  let total = 0;
  for (const { labels, value } of metrics.get(name) ?? []) {
    if (Object.entries(where).every(([label, wanted]) => labels[label] === wanted)) total += value;
  }
  return total;
}

// Cumulative counts of a histogram over all its other labels: [[upper bound, count], ...]
export function histogram(metrics, name) {
  const counts = new Map();
  for (const { labels, value } of metrics.get(`${name}_bucket`) ?? []) {
    const bound = parseNumber(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([one], [other]) => one - other);
}

// What lies between two readings of a histogram; all of the later one if counting began anew.
export function between(earlier, later) {
  const before = new Map(earlier);
  const differences = later.map(([bound, count]) => [bound, count - (before.get(bound) ?? 0)]);
  return differences.some(([, count]) => count < 0) ? later : differences;
}

// The value below which the part `q` lies, linear inside a bucket as Prometheus's
// histogram_quantile; null if nothing was counted.
export function quantile(buckets, q) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  const rank = q * total;
  let [low, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= rank) {
      if (bound === Infinity) return low; // nothing more is known
      return count === below ? bound : low + ((bound - low) * (rank - below)) / (count - below);
    }
    [low, below] = [bound, count];
  }
  return low;
}
