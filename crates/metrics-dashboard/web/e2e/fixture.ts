// Fixtures of the browser tests: a browser, a scripted service, and the real service without its servers.

import { type ChildProcess, spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { createServer, type ServerResponse } from "node:http";
import { type AddressInfo, createServer as createSocket } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { type BrowserContext, chromium } from "playwright-core";
import type { Instance, Overview, Partition } from "../src/api";

/** The folder `web/`. The tests run in `.build/e2e`. */
const WEB = resolve(process.cwd(), "../..");
const REPOSITORY = resolve(WEB, "../../..");
/** The content security policy of the real service. The test with the real service checks the page with the actual one. */
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

export interface Browser {
  context: BrowserContext;
  close(): Promise<void>;
}

/** Opens Debian's Chromium with a temporary user data folder. */
export async function openBrowser(): Promise<Browser> {
  const program = process.env["CHROMIUM"] ?? "/usr/bin/chromium";
  if (!existsSync(program)) throw new Error(`no browser at ${program}: install chromium, or set CHROMIUM to the path of a browser`);
  const folder = await mkdtemp(join(tmpdir(), "page-test-"));
  const flags = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ];
  const context = await chromium.launchPersistentContext(folder, { executablePath: program, headless: true, args: flags });
  return {
    context,
    close: async () => {
      await context.close();
      await rm(folder, { recursive: true, force: true });
    },
  };
}

export const partition = (id: number, change: Partial<Partition> = {}): Partition => ({
  partition: id,
  low_offset: 0,
  high_offset: 1000,
  next_offset: 990,
  events: 980,
  duplicates: 7,
  revised: 4,
  late: 2,
  dead_letters: 3,
  lag_messages: 10,
  lag_seconds: 1.5,
  standing: "behind",
  holder: { instance: "one", does: "running" },
  reasons: {},
  ...change,
});

export const overview = (change: Partial<Overview> = {}): Overview => ({
  stream: "user_created",
  as_of: new Date().toISOString(),
  events_produced: 1234567,
  events_processed: 1234000,
  rows_written: 1233000,
  duplicates: 700,
  revised: 40,
  late: 25,
  dead_letters: 300,
  lag_messages: 567,
  lag_seconds: 2.5,
  rate_average: 1500.4,
  rate_peak: 2812,
  rate_now: 42.25,
  replication: { factor: 1, in_sync: 1, verdict: "single_copy" },
  partitions: [partition(0), partition(1, { standing: "current", lag_messages: 0, lag_seconds: 0 })],
  reasons: {},
  ...change,
});

/** Serves the built page with figures that the test chooses. */
export class ScriptedService {
  private current = overview();
  private feeds = new Set<ServerResponse>();
  private readonly server = createServer((request, response) => {
    void this.answer(request.url ?? "/", response);
  });

  async start(): Promise<string> {
    await new Promise<void>((done) => this.server.listen(0, "127.0.0.1", done));
    return `http://127.0.0.1:${(this.server.address() as AddressInfo).port}`;
  }

  show(change: Partial<Overview>): void {
    this.current = overview(change);
    for (const feed of this.feeds) this.send(feed);
  }

  /** Whether the service drops all API requests. Set by `break` and cleared by `mend`. */
  down = false;

  break(): void {
    this.down = true;
    for (const feed of this.feeds) feed.destroy();
    this.feeds.clear();
  }

  mend(): void {
    this.down = false;
  }

  async stop(): Promise<void> {
    this.break();
    this.server.closeAllConnections();
    await new Promise((done) => this.server.close(done));
  }

  private send(feed: ServerResponse): void {
    feed.write(`event: overview\nretry: 200\ndata: ${JSON.stringify({ ...this.current, as_of: new Date().toISOString() })}\n\n`);
  }

  private async answer(url: string, response: ServerResponse): Promise<void> {
    response.setHeader("content-security-policy", POLICY);
    const path = new URL(url, "http://page").pathname;
    if (path.startsWith("/api/") && this.down) return void response.socket?.destroy();
    if (path === "/api/v1/stream") {
      response.writeHead(200, { "content-type": "text/event-stream" });
      this.feeds.add(response);
      response.on("close", () => this.feeds.delete(response));
      this.send(response);
      const again = setInterval(() => this.send(response), 500);
      response.on("close", () => clearInterval(again));
      return;
    }
    const json = this.json(path);
    if (json !== undefined) {
      response.writeHead(200, { "content-type": "application/json" });
      return void response.end(JSON.stringify(json));
    }
    await this.file(path === "/" ? "/index.html" : path, response);
  }

  private json(path: string): unknown {
    const now = Date.now();
    const minute = 60_000;
    if (path === "/api/v1/throughput") {
      const at = (i: number) => Math.floor(now / 1000) - 900 + i;
      const point = (_: unknown, i: number) => ({
        at: at(i),
        events_per_second: Math.max(0, 900 + 600 * Math.sin(i / 60) + (i % 17) * 12),
        lag_messages: i < 200 ? null : Math.max(0, Math.round(300 * Math.sin(i / 90))),
        lag_seconds: null,
      });
      return { step_seconds: 1, points: Array.from({ length: 900 }, point) };
    }
    if (path === "/api/v1/runs") {
      const run = (i: number, state: string, error: string | null) => ({
        interval_start: now - i * minute,
        interval_end: now - (i - 1) * minute,
        state,
        run_type: i > 2 ? "catch_up" : "scheduled",
        attempt: error === null ? 1 : 3,
        records: 1000,
        acked: error === null ? 1000 : 0,
        started_at: now - (i - 1) * minute,
        finished_at: state === "running" ? null : now - (i - 1) * minute + 1234,
        error,
      });
      const failed = run(3, "failed", "the source responded with status 503 three times");
      return { runs: [run(1, "running", null), run(2, "succeeded", null), failed, run(4, "succeeded", null)], reason: null };
    }
    if (path === "/api/v1/services") {
      const one: Omit<Instance, "service"> = {
        instance: "host-1", version: "0.1.0", started_at: now - 3_700_000, seen_at: now, state: "ready", reason: null, partitions: {},
      };
      const services: Instance[] = ["ingest-producer", "metrics-dashboard"].map((service) => ({ service, ...one }));
      services.push({ ...one, service: "stream-processor", state: "refused", reason: "the stream is registered with another layout" });
      return { services, reason: null };
    }
    return undefined;
  }

  private async file(path: string, response: ServerResponse): Promise<void> {
    const kinds: Record<string, string> = { html: "text/html; charset=utf-8", js: "text/javascript", css: "text/css", svg: "image/svg+xml" };
    const body = await readFile(join(WEB, "dist", path)).catch(() => null);
    if (body === null) return void response.writeHead(404).end();
    response.writeHead(200, { "content-type": kinds[path.split(".").pop() ?? ""] ?? "text/plain" }).end(body);
  }
}

/** Starts the real service with the addresses of servers that do not run. */
export async function startRealService(): Promise<{ url: string; process: ChildProcess }> {
  const target = process.env["CARGO_TARGET_DIR"] ?? join(REPOSITORY, "target");
  const known = ["debug", "release"].map((profile) => join(target, profile, "metrics-dashboard")).filter(existsSync);
  const program = process.env["METRICS_DASHBOARD_BIN"] ?? known[0];
  if (program === undefined) {
    throw new Error(`no metrics-dashboard under ${target}: run \`cargo build -p metrics-dashboard\`, or set METRICS_DASHBOARD_BIN to the path of the program`);
  }
  const port = await freePort();
  const closed = await freePort();
  const child = spawn(
    program,
    ["--http-listen", `127.0.0.1:${port}`, "--kafka-brokers", `127.0.0.1:${closed}`, "--cassandra-nodes", `127.0.0.1:${closed}`],
    { cwd: REPOSITORY, stdio: ["ignore", "ignore", "inherit"] },
  );
  return { url: `http://127.0.0.1:${port}`, process: child };
}

async function freePort(): Promise<number> {
  const socket = createSocket();
  await new Promise<void>((done) => socket.listen(0, "127.0.0.1", done));
  const { port } = socket.address() as AddressInfo;
  await new Promise((done) => socket.close(done));
  return port;
}

/** Waits until `ready` returns true. Fails with the description `what` after `limit` milliseconds. */
export async function until(what: string, ready: () => Promise<boolean>, limit = 15_000): Promise<void> {
  const end = Date.now() + limit;
  while (!(await ready().catch(() => false))) {
    if (Date.now() > end) throw new Error(`not within ${limit / 1000} s: ${what}`);
    await new Promise((done) => setTimeout(done, 100));
  }
}
