import assert from "node:assert/strict";
import { test } from "node:test";
import { Connection, LOST_AFTER_MS, STALE_AFTER_MS } from "../src/connection";

test("figures are live while messages arrive and become stale without them", () => {
  const c = new Connection(0);
  assert.equal(c.standing(10).state, "connecting");
  c.message(1_000);
  assert.equal(c.standing(1_000 + STALE_AFTER_MS - 1).state, "live");
  assert.deepEqual(c.standing(1_000 + STALE_AFTER_MS), { state: "stale", text: "Stale: figures are 4 s old" });
  assert.equal(c.standing(1_000 + LOST_AFTER_MS).state, "disconnected");
  c.message(60_000);
  assert.equal(c.standing(60_001).state, "live");
});

test("a broken feed with stale figures is disconnected", () => {
  const c = new Connection(0);
  c.message(1_000);
  c.failed();
  assert.equal(c.standing(2_000).state, "live");
  assert.equal(c.standing(1_000 + STALE_AFTER_MS).state, "disconnected");
});

test("a service that never responds is disconnected", () => {
  assert.equal(new Connection(0).standing(STALE_AFTER_MS).state, "disconnected");
  const c = new Connection(0);
  c.failed();
  assert.match(c.standing(1).text, /No response/);
});
