// Formats figures as text. Pure.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

/** `1,234,567`. */
export function count(value: number): string {
  return whole.format(value);
}

/** Events per second, with one decimal below 100. */
export function rate(value: number): string {
  return value > 0 && value < 100 ? tenth.format(value) : whole.format(value);
}

/** Axis labels: `12K`. */
export function short(value: number): string {
  return compact.format(value);
}

/** A duration in its two largest units: `0.4 s`, `42 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`. */
export function span(seconds: number): string {
  if (seconds < 10) return `${(Math.round(seconds * 10) / 10).toString()} s`;
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  const pairs: [number, string, number, string][] = [
    [86_400, "d", 3_600, "h"],
    [3_600, "h", 60, "min"],
    [60, "min", 1, "s"],
  ];
  for (const [large, largeName, small, smallName] of pairs) {
    if (s < large) continue;
    const rest = Math.floor((s % large) / small);
    return rest > 0 ? `${Math.floor(s / large)} ${largeName} ${rest} ${smallName}` : `${Math.floor(s / large)} ${largeName}`;
  }
  return `${s} s`;
}

/** Time of day in UTC, such as `14:03:00`, with the date if it is not today. */
export function clock(ms: number, nowMs: number): string {
  const iso = new Date(ms).toISOString();
  const time = iso.slice(11, 19);
  return iso.slice(0, 10) === new Date(nowMs).toISOString().slice(0, 10) ? time : `${iso.slice(0, 10)} ${time}`;
}

/** `catch_up` → `catch up`. */
export function words(name: string): string {
  return name.replaceAll("_", " ");
}
