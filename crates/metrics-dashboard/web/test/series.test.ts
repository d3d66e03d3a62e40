import assert from "node:assert/strict";
import { test } from "node:test";
import type { ChartPoint } from "../src/api";
import { columns, inWords, timeLabels } from "../src/series";

const point = (at: number, events_per_second: number, lag_messages: number | null): ChartPoint => ({
  at,
  events_per_second,
  lag_messages,
  lag_seconds: null,
});

test("points are converted to columns and an unknown lag is a gap", () => {
  assert.deepEqual(columns([point(1, 10, null), point(2, 20, 5)]), [[1, 2], [10, 20], [null, 5]]);
});

test("the chart is described in one sentence", () => {
  assert.equal(inWords([], 15), "The throughput of the last 15 min is unknown.");
  assert.equal(
    inWords([point(1, 10, null), point(2, 20, 5)], 60),
    "Last 1 h: 15.0 events per second on average, peak 20.0; peak lag 5 messages.",
  );
  assert.match(inWords([point(1, 10, null)], 60), /lag unknown/);
});

test("time labels show dates at the start of days and seconds only if needed", () => {
  const midnight = Date.UTC(2026, 10, 23) / 1000;
  assert.deepEqual(timeLabels([midnight - 60, midnight, midnight + 60]), ["23:59", "11-23", "00:01"]);
  assert.deepEqual(timeLabels([midnight + 15, midnight + 30]), ["00:00:15", "00:00:30"]);
  assert.deepEqual(timeLabels([midnight], true), ["00:00:00"]);
});
