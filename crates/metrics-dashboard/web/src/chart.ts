// The chart: events per second as an area, and lag as a line with its own axis.

import uPlot from "uplot";
import type { ChartPoint } from "./api";
import { count, rate, short } from "./format";
import { columns, timeLabels } from "./series";

const HEIGHT = 260;

function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export class ThroughputChart {
  private plot: uPlot | null = null;
  private points: ChartPoint[] = [];

  constructor(private readonly box: HTMLElement) {
    new ResizeObserver(() => this.plot?.setSize({ width: this.width(), height: HEIGHT })).observe(box);
  }

  show(points: ChartPoint[]): void {
    this.points = points;
    if (this.plot === null) this.plot = this.make();
    this.plot.setData(columns(points));
  }

  /** Redraws the chart with the current colours of the page. */
  repaint(): void {
    if (this.plot === null) return;
    this.plot.destroy();
    this.plot = this.make();
  }

  private width(): number {
    return Math.max(240, this.box.clientWidth);
  }

  private make(): uPlot {
    const [text, grid, rates, lags] = ["--muted", "--line", "--rate", "--lag"].map(colour) as [string, string, string, string];
    const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "12px system-ui, sans-serif" };
    const shown = (format: (value: number) => string) => (_: uPlot, value: number | null, __: number, at: number | null) =>
      at === null ? "–" : value === null ? "unknown" : format(value);
    return new uPlot(
      {
        width: this.width(),
        height: HEIGHT,
        tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
        legend: { markers: { width: 2 } },
        cursor: { drag: { x: false, y: false } },
        scales: {
          y: { range: (_, __, max) => [0, Math.max(1, max * 1.1)] },
          lag: { range: (_, __, max) => [0, Math.max(10, max * 1.1)] },
        },
        axes: [
          { ...axis, space: 70, values: (_, ticks) => timeLabels(ticks) },
          { ...axis, scale: "y", size: 56, values: (_, ticks) => ticks.map(short) },
          { ...axis, scale: "lag", side: 1, size: 56, grid: { show: false }, values: (_, ticks) => ticks.map(short) },
        ],
        series: [
          { label: "Time (UTC)", value: (_: uPlot, value: number | null) => (value === null ? "–" : timeLabels([value], true)[0] ?? "") },
          { label: "Events per second", scale: "y", stroke: rates, width: 2, fill: `${rates}2e`, value: shown(rate) },
          { label: "Lag (messages)", scale: "lag", stroke: lags, width: 2, dash: [6, 4], value: shown(count) },
        ],
      },
      columns(this.points),
      this.box,
    );
  }
}
