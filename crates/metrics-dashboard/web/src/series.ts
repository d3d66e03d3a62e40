// Converts chart points to the columns that uPlot expects, and to a text for screen readers. Pure.

import type { ChartPoint } from "./api";
import { count, rate, span } from "./format";

export type Columns = [number[], number[], (number | null)[]];

/** Columns: start of each step, events per second, lag in messages. */
export function columns(points: ChartPoint[]): Columns {
  return [points.map((p) => p.at), points.map((p) => p.events_per_second), points.map((p) => p.lag_messages)];
}

/** Describes the chart in one sentence. */
export function inWords(points: ChartPoint[], minutes: number): string {
  const period = span(minutes * 60);
  if (points.length === 0) return `The throughput of the last ${period} is unknown.`;
  const rates = points.map((p) => p.events_per_second);
  const mean = rates.reduce((sum, r) => sum + r, 0) / rates.length;
  const peak = rates.reduce((a, b) => Math.max(a, b), 0);
  const lags = points.map((p) => p.lag_messages).filter((lag): lag is number => lag !== null);
  const lag = lags.length > 0 ? `peak lag ${count(Math.max(...lags))} messages` : "lag unknown";
  return `Last ${period}: ${rate(mean)} events per second on average, peak ${rate(peak)}; ${lag}.`;
}

/** Labels of a time axis in UTC: a date at the start of a day, and seconds only if a tick or `exact` needs them. */
export function timeLabels(ticks: number[], exact = false): string[] {
  const seconds = exact || ticks.some((t) => t % 60 !== 0);
  return ticks.map((t) => {
    const iso = new Date(t * 1000).toISOString();
    return t % 86_400 === 0 && !exact ? iso.slice(5, 10) : iso.slice(11, seconds ? 19 : 16);
  });
}
