// Tests the page in a real browser. Saves screenshots to the folder in SCREENSHOTS, if it is set.
// E2E_SKIP=real-service skips the test that needs the compiled service. No other test can be skipped.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { after, before, test } from "node:test";
import type { Page } from "playwright-core";
import type { Reason } from "../src/api";
import { type Browser, ScriptedService, openBrowser, partition, startRealService, until } from "./fixture";

const axeFile = createRequire(join(process.cwd(), "anchor.js")).resolve("axe-core/axe.min.js");
let browser: Browser;
let service: ScriptedService;
let url: string;

before(async () => {
  browser = await openBrowser();
  service = new ScriptedService();
  url = await service.start();
});

after(async () => {
  await browser?.close();
  await service?.stop();
});

/** Opens the page and calls `use`. Fails afterwards if the browser reported an error or a blocked resource. */
async function withPage(address: string, use: (page: Page) => Promise<void>, complaintsAllowed = /^$/): Promise<void> {
  const page = await browser.context.newPage();
  const complaints: string[] = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (message) => {
    if (message.type() === "error") complaints.push(message.text());
  });
  page.on("request", (request) => {
    const asked = new URL(request.url());
    if (asked.origin !== new URL(address).origin && asked.protocol.startsWith("http")) complaints.push(`fetched ${asked.href}`);
  });
  try {
    await page.goto(address);
    await use(page);
    assert.deepEqual(complaints.filter((text) => !complaintsAllowed.test(text)), []);
  } finally {
    await page.close();
  }
}

const figure = (page: Page, name: string) => page.locator(`[data-figure="${name}"]`);
const connection = (page: Page) => page.locator("#connection").innerText();
const live = (page: Page) => until("the page is live", async () => (await connection(page)) === "Live");

async function shoot(page: Page, name: string): Promise<void> {
  const folder = process.env["SCREENSHOTS"];
  if (folder !== undefined) await page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });
}

async function violations(page: Page): Promise<string[]> {
  // Injected through the DevTools protocol instead of a script element, which the policy of the page would block.
  await page.evaluate(await readFile(axeFile, "utf8"));
  const found = await page.evaluate(async () => {
    const axe = (window as unknown as { axe: { run(): Promise<{ violations: { id: string; nodes: { html: string }[] }[] }> } }).axe;
    return (await axe.run()).violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html).join(" | ")}`);
  });
  return found;
}

test("every figure of the overview is shown and updated live", async () => {
  service.show({});
  await withPage(url, async (page) => {
    await live(page);
    const shown: Record<string, string> = {
      events_produced: "1,234,567",
      events_processed: "1,234,000",
      rows_written: "1,233,000",
      duplicates: "700",
      revised: "40",
      late: "25",
      dead_letters: "300",
      lag_messages: "567",
      lag_seconds: "2.5 s",
      rate_now: "42.3",
      rate_average: "1,500",
      rate_peak: "2,812",
      replication: "Single copy",
    };
    for (const [name, text] of Object.entries(shown)) assert.equal(await figure(page, name).innerText(), text, name);
    assert.equal(await page.locator("#partitions tr").count(), 2);
    await until("runs are listed", async () => (await page.locator("#runs tr").count()) === 4);
    await until("services are listed", async () => (await page.locator("#services tr").count()) === 3);
    const refused = page.locator("#services tr", { hasText: "stream-processor" });
    assert.match(await refused.innerText(), /refused.*registered with another layout/s);
    await until("the chart is described", async () => /on average/.test(await page.locator("#chart-words").innerText()));
    assert.equal(await page.locator("#chart canvas").count(), 1);
    await shoot(page, "live-light");
    service.show({ rows_written: 1_233_001 });
    await until("a new figure is shown", async () => (await figure(page, "rows_written").innerText()) === "1,233,001");
  });
});

test("a figure that is null is shown as unknown with its reason, never as 0", async () => {
  const message = "kafka at 127.0.0.1:9092 does not answer; is it running?";
  const reason: Reason = { source: "kafka", message, detail: "Local: Broker transport failure" };
  const names = ["events_produced", "lag_messages", "lag_seconds", "replication"] as const;
  const reasons = Object.fromEntries(names.map((name) => [name, reason]));
  const unknown = { high_offset: null, lag_messages: null, lag_seconds: null, standing: null };
  const blind = partition(0, { ...unknown, reasons: { lag_messages: reason, standing: reason, high_offset: reason, lag_seconds: reason } });
  service.show({ events_produced: null, lag_messages: null, lag_seconds: null, replication: null, reasons, partitions: [blind] });
  await withPage(url, async (page) => {
    await live(page);
    for (const name of names) {
      assert.equal(await figure(page, name).innerText(), "unknown", name);
      assert.equal(await page.locator(`[data-why="${name}"]`).innerText(), `unknown: ${message}`, name);
    }
    const withDetail = `${message} (Local: Broker transport failure)`;
    assert.equal(await page.locator("#partitions td.unknown").first().getAttribute("title"), `unknown: ${withDetail}`);
    assert.deepEqual(await page.locator("#reasons li").allInnerTexts(), [withDetail], "the same reason is listed once");
    assert.equal(await figure(page, "rows_written").innerText(), "1,233,000");
    await shoot(page, "unknown");
    service.show({});
    await until("a figure is known again", async () => (await figure(page, "lag_messages").innerText()) === "567");
    assert.equal(await page.locator('[data-why="lag_messages"]').isVisible(), false);
  });
});

test("a partition that is not processed is listed with the reason", async () => {
  const halted = { instance: "one", does: "halted: partition 1 is halted at offset 7: BadMessage" };
  const nobody: Reason = { source: "dashboard", message: "no processor holds partition 2", detail: null };
  const alone = partition(2, { holder: null, reasons: { holder: nobody } });
  service.show({ partitions: [partition(0), partition(1, { holder: halted }), alone] });
  await withPage(url, async (page) => {
    await live(page);
    const processors = await page.locator("#partitions tr > :nth-child(3)").allInnerTexts();
    assert.deepEqual(processors, ["one", "one: halted", "none"]);
    assert.deepEqual(await page.locator("#reasons li").allInnerTexts(), [`partition 1: ${halted.does}`, nobody.message]);
    await shoot(page, "halted");
    service.show({});
    await until("nothing needs attention any more", async () => !(await page.locator("#reasons").isVisible()));
  });
});

test("the page shows that the service is gone and recovers when it is back", async () => {
  service.show({});
  await withPage(
    url,
    async (page) => {
      await live(page);
      service.break();
      await until("the page says it is disconnected", async () => (await connection(page)).startsWith("Disconnected: figures are"));
      await shoot(page, "disconnected");
      service.mend();
      await live(page);
    },
    /ERR_|Failed to load resource/,
  );
});

test("axe finds no violations in light and dark colours, wide and narrow", async () => {
  service.show({});
  for (const [scheme, width] of [["light", 1320], ["dark", 1320], ["dark", 390]] as const) {
    await withPage(url, async (page) => {
      await page.emulateMedia({ colorScheme: scheme });
      await page.setViewportSize({ width, height: 900 });
      await live(page);
      await until("runs are listed", async () => (await page.locator("#runs tr").count()) === 4);
      assert.deepEqual(await violations(page), [], `${scheme} ${width}`);
      const overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
      assert.ok(overflow <= 0, `the page is ${overflow} px too wide at ${width} px`);
      await shoot(page, `${scheme}-${width}`);
    });
  }
});

test("a button switches the colours and the choice is kept", async () => {
  await withPage(url, async (page) => {
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    await page.emulateMedia({ colorScheme: "light" });
    const first = await ground();
    await page.locator("#theme").click();
    const second = await ground();
    assert.notEqual(first, second);
    await page.reload();
    assert.equal(await ground(), second);
    await page.locator("#theme").click();
    assert.equal(await ground(), first);
  });
});

test("the real service serves the page with its policy and shows only reasons while its servers are down", async (t) => {
  if (process.env["E2E_SKIP"] === "real-service") return t.skip("E2E_SKIP=real-service");
  const real = await startRealService();
  try {
    await until("the service responds", async () => (await fetch(`${real.url}/healthz`)).ok);
    const answer = await fetch(real.url);
    assert.match(answer.headers.get("content-security-policy") ?? "", /^default-src 'none'; script-src 'self';/);
    assert.equal((await fetch(`${real.url}/readyz`)).status, 503);
    await withPage(
      real.url,
      async (page) => {
        await live(page);
        await until("the reason of the unknown lag is shown", async () =>
          /does not answer/.test(await page.locator('[data-why="lag_messages"]').innerText()),
        );
        for (const name of ["events_produced", "rows_written", "rate_now", "replication"]) {
          assert.equal(await figure(page, name).innerText(), "unknown", name);
        }
        assert.deepEqual(await violations(page), []);
        await shoot(page, "real-service-alone");
      },
      /503/,
    );
  } finally {
    real.process.kill("SIGTERM");
    const code = await new Promise((done) => real.process.once("exit", done));
    assert.equal(code, 143);
  }
});
