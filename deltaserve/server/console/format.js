// Numbers as people read them; always with their unit.

const GROUPED = new Intl.NumberFormat("en");
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const DAYS = new Intl.DateTimeFormat(undefined, { dateStyle: "medium" });
const TIMES = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export const NONE = "–";

export const count = (value) => (value === null || value === undefined ? NONE : GROUPED.format(value));
export const compact = (value) =>
  value === null || value === undefined ? NONE : value < 10000 ? count(value) : COMPACT.format(value);
export const several = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit && value < 99.95 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

// Three digits are enough to compare.
export function short(value) {
  if (value === null || value === undefined) return NONE;
  if (value !== 0 && Math.abs(value) < 10) return String(Number(value.toPrecision(2)));
  return Math.abs(value) < 10000 ? GROUPED.format(Math.round(value)) : COMPACT.format(value);
}

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  return value < 1 ? `${short(value * 1000)} ms` : `${Number(value.toPrecision(3))} s`;
}

export const percent = (part) => `${short(100 * part)} %`;
export const day = (unix) => (unix ? DAYS.format(unix * 1000) : NONE);
export const moment = (unix) => (unix ? TIMES.format(unix * 1000) : NONE);
export const today = () => new Date().toISOString().slice(0, 10); // days of usage are UTC's
export const daysAgo = (days) => new Date(Date.now() - days * 864e5).toISOString().slice(0, 10);
