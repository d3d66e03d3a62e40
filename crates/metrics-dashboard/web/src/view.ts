// Shows the figures in the elements of index.html. A figure that is null is shown as "unknown", with its reason.

import type { Instance, Listed, Overview, Partition, Reason, Replication, Run } from "./api";
import type { Standing } from "./connection";
import { clock, count, rate, span, words } from "./format";

type Figures = { [K in keyof Overview]?: (value: NonNullable<Overview[K]>) => string };

const FIGURES: Figures = {
  rate_now: rate,
  rate_average: rate,
  rate_peak: rate,
  events_produced: count,
  events_processed: count,
  rows_written: count,
  duplicates: count,
  revised: count,
  late: count,
  dead_letters: count,
  lag_messages: count,
  lag_seconds: span,
  replication: (r: Replication) => VERDICTS[r.verdict],
};

const VERDICTS: Record<Replication["verdict"], string> = {
  healthy: "Healthy",
  single_copy: "Single copy",
  under_replicated: "Under-replicated",
  offline: "Offline",
};

const STANDINGS: Record<NonNullable<Partition["standing"]>, string> = {
  current: "up to date",
  behind: "behind",
  history_lost: "history lost",
  beyond_the_end: "beyond the end",
};

function element(id: string): HTMLElement {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`index.html has no element ${id}`);
  return found;
}

function setText(node: Element, text: string): void {
  if (node.textContent !== text) node.textContent = text;
}

export function showConnection({ state, text }: Standing): void {
  document.documentElement.dataset["connection"] = state;
  setText(element("connection"), text);
}

export function showOverview(overview: Overview): void {
  setText(element("stream"), overview.stream);
  setText(element("as-of"), `${overview.as_of.slice(11, 19)} UTC`);
  document.title = overview.rate_now === null ? `${overview.stream}: unknown` : `${rate(overview.rate_now)}/s ${overview.stream}`;
  for (const [name, format] of Object.entries(FIGURES) as [keyof Overview, (value: unknown) => string][]) {
    const value = overview[name];
    for (const node of document.querySelectorAll(`[data-figure="${name}"]`)) {
      node.classList.toggle("unknown", value === null);
      setText(node, value === null ? "unknown" : format(value));
    }
    const reason = value === null ? overview.reasons[name] : undefined;
    for (const node of document.querySelectorAll<HTMLElement>(`[data-why="${name}"]`)) {
      setText(node, value === null ? `unknown: ${message(reason)}` : "");
      node.title = value === null ? whole(reason) : "";
      node.hidden = value !== null;
    }
  }
  showReasons(overview);
  showReplication(overview.replication);
  showPartitions(overview);
  mark("lag", overview.lag_messages !== null && overview.lag_messages > 0 ? "busy" : "");
  mark("dead_letters", overview.dead_letters !== null && overview.dead_letters > 0 ? "bad" : "");
}

/** The message of a reason, one line. */
function message(reason: Reason | undefined): string {
  return reason?.message ?? "no reason given";
}

/** The message of a reason with its detail. */
function whole(reason: Reason | undefined): string {
  return reason?.detail ? `${reason.message} (${reason.detail})` : message(reason);
}

/** Lists all distinct reasons with their details, and all partitions that a processor holds but does not process. */
function showReasons(overview: Overview): void {
  const partitions = overview.partitions ?? [];
  const unknown = [overview, ...partitions].flatMap((part) => Object.values(part.reasons)).map(whole);
  const idle = partitions.filter(isIdle).map((p) => `partition ${p.partition}: ${p.holder?.does}`);
  const box = element("reasons");
  const wanted = [...new Set([...idle, ...unknown])].slice(0, 8);
  box.hidden = wanted.length === 0;
  const list = box.querySelector("ul");
  if (list === null || box.dataset["shown"] === wanted.join("\n")) return;
  box.dataset["shown"] = wanted.join("\n");
  list.replaceChildren(
    ...wanted.map((reason) => {
      const item = document.createElement("li");
      item.textContent = reason;
      return item;
    }),
  );
}

/** Whether a processor holds the partition but neither processes nor opens it. */
function isIdle({ holder }: Partition): boolean {
  return holder !== null && !["running", "opening"].includes(holder.does);
}

function showReplication(replication: Replication | null): void {
  const detail = replication === null ? "" : `${replication.in_sync} of ${replication.factor} copies in sync`;
  setText(element("replication-detail"), detail);
  const bad = replication !== null && ["under_replicated", "offline"].includes(replication.verdict);
  mark("replication", bad ? "bad" : replication?.verdict === "single_copy" ? "busy" : "");
}

function mark(tile: string, state: "" | "busy" | "bad"): void {
  element(`tile-${tile}`).dataset["state"] = state;
}

interface Cell {
  text: string;
  title?: string;
  kind?: "number" | "unknown";
  badge?: string;
}

function number(value: number | null, reason: Reason | undefined, format = count): Cell {
  return value === null ? unknown(reason) : { text: format(value), kind: "number" };
}

function unknown(reason: Reason | undefined): Cell {
  return { text: "unknown", title: `unknown: ${whole(reason)}`, kind: "unknown" };
}

function fillTable(id: string, rows: Cell[][], empty: string): void {
  const body = element(id);
  const columns = body.closest("table")?.querySelectorAll("thead th").length ?? 1;
  const lines = rows.length > 0 ? rows : [[{ text: empty }]];
  const wanted = JSON.stringify(lines);
  // An unchanged table is not rebuilt, so that selections and scroll positions are kept.
  if (body.dataset["shown"] === wanted) return;
  body.dataset["shown"] = wanted;
  body.replaceChildren(
    ...lines.map((cells) => {
      const line = document.createElement("tr");
      cells.forEach((cell, index) => line.append(makeCell(cell, rows.length === 0 ? columns : 1, index)));
      return line;
    }),
  );
}

function makeCell(cell: Cell, width: number, index: number): HTMLElement {
  const node = document.createElement(index === 0 && width === 1 ? "th" : "td");
  if (index === 0 && width === 1) node.setAttribute("scope", "row");
  if (width > 1) {
    node.setAttribute("colspan", String(width));
    node.className = "empty";
  }
  if (cell.kind !== undefined) node.classList.add(cell.kind);
  if (cell.title !== undefined) node.title = cell.title;
  if (cell.badge === undefined) {
    node.textContent = cell.text;
  } else {
    const badge = document.createElement("span");
    badge.className = "badge";
    badge.dataset["kind"] = cell.badge;
    badge.textContent = cell.text;
    node.append(badge);
  }
  return node;
}

function holder(p: Partition): Cell {
  const why = p.reasons["holder"];
  if (p.holder === null) return why?.source === "dashboard" ? { text: "none", badge: "failed", title: message(why) } : unknown(why);
  const { instance, does } = p.holder;
  const word = does.split(":", 1)[0];
  return isIdle(p) ? { text: `${instance}: ${word}`, badge: "failed", title: does } : { text: instance };
}

function showPartitions(overview: Overview): void {
  const rows = (overview.partitions ?? []).map((p): Cell[] => {
    const why = p.reasons;
    const standing: Cell =
      p.standing === null ? unknown(why["standing"]) : { text: STANDINGS[p.standing], badge: p.standing };
    return [
      { text: String(p.partition), kind: "number" },
      standing,
      holder(p),
      number(p.high_offset, why["high_offset"]),
      number(p.next_offset, why["next_offset"]),
      number(p.lag_messages, why["lag_messages"]),
      number(p.lag_seconds, why["lag_seconds"], span),
      number(p.events, why["events"]),
      number(p.duplicates, why["duplicates"]),
      number(p.revised, why["revised"]),
      number(p.late, why["late"]),
      number(p.dead_letters, why["dead_letters"]),
    ];
  });
  const none = overview.partitions === null ? `unknown: ${message(overview.reasons["partitions"])}` : "No partitions yet.";
  fillTable("partitions", rows, none);
}

export function showRuns(runs: Listed<Run>, nowMs: number): void {
  const text = (value: string | null): string => (value === null ? "–" : words(value));
  const rows = (runs.list ?? []).map((run): Cell[] => {
    const took = run.started_at !== null && run.finished_at !== null ? (run.finished_at - run.started_at) / 1000 : null;
    return [
      { text: clock(run.interval_start, nowMs) },
      { text: text(run.state), badge: run.state ?? "none" },
      { text: text(run.run_type) },
      { text: run.attempt === null ? "–" : String(run.attempt), kind: "number" },
      { text: run.records === null ? "–" : count(run.records), kind: "number" },
      { text: run.acked === null ? "–" : count(run.acked), kind: "number" },
      { text: took === null ? "–" : span(Math.max(0, took)), kind: "number" },
      { text: run.error ?? "" },
    ];
  });
  fillTable("runs", rows, runs.list === null ? `unknown: ${message(runs.reason)}` : "No runs yet: the producer has not started an interval.");
}

export function showServices(services: Listed<Instance>, nowMs: number): void {
  const rows = (services.list ?? []).map((one): Cell[] => {
    const alive = one.state === "ready" || one.state === "not_ready";
    return [
      { text: one.service },
      { text: one.instance },
      { text: words(one.state), badge: one.state === "ready" ? "succeeded" : "failed" },
      { text: one.version ?? "–" },
      { text: alive && one.started_at !== null ? span(Math.max(0, (nowMs - one.started_at) / 1000)) : "–", kind: "number" },
      { text: one.reason ?? "" },
    ];
  });
  fillTable("services", rows, services.list === null ? `unknown: ${message(services.reason)}` : "No service has sent a heartbeat in the last minute.");
}

export function showChart(words: string, reason: Reason | null): void {
  setText(element("chart-words"), reason === null ? words : `unknown: ${reason.message}`);
}
