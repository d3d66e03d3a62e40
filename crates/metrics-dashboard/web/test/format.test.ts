import assert from "node:assert/strict";
import { test } from "node:test";
import { clock, count, rate, span, words } from "../src/format";

test("counts have thousands separators", () => {
  assert.equal(count(0), "0");
  assert.equal(count(1234567), "1,234,567");
});

test("rates have one decimal below 100", () => {
  assert.equal(rate(0), "0");
  assert.equal(rate(0.26), "0.3");
  assert.equal(rate(99.94), "99.9");
  assert.equal(rate(123.4), "123");
  assert.equal(rate(98765.4), "98,765");
});

test("durations show their two largest units", () => {
  const cases: [number, string][] = [
    [0, "0 s"],
    [0.42, "0.4 s"],
    [42.4, "42 s"],
    [59.6, "1 min"],
    [185, "3 min 5 s"],
    [3_600, "1 h"],
    [7_800, "2 h 10 min"],
    [273_600, "3 d 4 h"],
  ];
  for (const [seconds, text] of cases) assert.equal(span(seconds), text, String(seconds));
});

test("times of another day include the date", () => {
  const noon = Date.UTC(2026, 10, 23, 12);
  assert.equal(clock(noon - 1000, noon), "11:59:59");
  assert.equal(clock(noon - 86_400_000, noon), "2026-11-22 12:00:00");
});

test("stored names are shown with spaces", () => {
  assert.equal(words("catch_up"), "catch up");
});
