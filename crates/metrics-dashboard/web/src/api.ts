// Types of the JSON that the service returns (GET /api/v1/…). An unknown figure is null, and `reasons` contains the reason.

/** Why a figure is unknown: a message in one line, and the error of the client library. */
export interface Reason {
  source: "kafka" | "cassandra" | "dashboard" | "request";
  message: string;
  detail: string | null;
}

export type Reasons = Record<string, Reason>;

/** The processor that holds a partition. */
export interface Holder {
  instance: string;
  /** "running", or another state with a reason. */
  does: string;
}

export interface Partition {
  partition: number;
  low_offset: number | null;
  high_offset: number | null;
  next_offset: number | null;
  events: number | null;
  duplicates: number | null;
  revised: number | null;
  late: number | null;
  dead_letters: number | null;
  lag_messages: number | null;
  lag_seconds: number | null;
  standing: "current" | "behind" | "history_lost" | "beyond_the_end" | null;
  holder: Holder | null;
  reasons: Reasons;
}

export interface Replication {
  factor: number;
  in_sync: number;
  verdict: "healthy" | "single_copy" | "under_replicated" | "offline";
}

export interface Overview {
  stream: string;
  as_of: string;
  events_produced: number | null;
  events_processed: number | null;
  rows_written: number | null;
  duplicates: number | null;
  revised: number | null;
  late: number | null;
  dead_letters: number | null;
  lag_messages: number | null;
  lag_seconds: number | null;
  rate_average: number | null;
  rate_peak: number | null;
  rate_now: number | null;
  replication: Replication | null;
  partitions: Partition[] | null;
  reasons: Reasons;
}

export interface ChartPoint {
  at: number;
  events_per_second: number;
  lag_messages: number | null;
  lag_seconds: number | null;
}

export interface Chart {
  step_seconds: number;
  points: ChartPoint[];
}

export interface Run {
  interval_start: number;
  interval_end: number | null;
  state: string | null;
  run_type: string | null;
  attempt: number | null;
  records: number | null;
  acked: number | null;
  started_at: number | null;
  finished_at: number | null;
  error: string | null;
}

export interface Instance {
  service: string;
  instance: string;
  version: string | null;
  started_at: number | null;
  seen_at: number | null;
  state: "ready" | "not_ready" | "silent" | "refused";
  reason: string | null;
  partitions: Record<string, string>;
}

export type Listed<T> = { list: T[]; reason: null } | { list: null; reason: Reason };

/** An error response of the service. */
export class Refusal extends Error {
  constructor(readonly reason: Reason) {
    super(reason.message);
  }
}

function dashboard(message: string): Reason {
  return { source: "dashboard", message, detail: null };
}

/** Converts any thrown error to a reason. */
export function reasonOf(error: unknown): Reason {
  if (error instanceof Refusal) return error.reason;
  return dashboard(error instanceof Error ? error.message : String(error));
}

/** Fetches JSON from the service. Throws a `Refusal` if the service responds with an error. */
export async function fetchJson(path: string): Promise<unknown> {
  const answer = await fetch(path, { headers: { accept: "application/json" } });
  const body: unknown = await answer.json().catch(() => null);
  if (answer.ok) return body;
  if (body !== null && typeof body === "object" && "error" in body) throw new Refusal(body.error as Reason);
  throw new Refusal(dashboard(`the service responded with HTTP status ${answer.status}`));
}

/** Fetches the list at `/api/v1/<name>`, whose key in the JSON is also `name`. Never throws. */
export async function fetchList<T>(name: string): Promise<Listed<T>> {
  try {
    const body = (await fetchJson(`/api/v1/${name}`)) as Record<string, unknown>;
    const list = body[name];
    if (Array.isArray(list)) return { list: list as T[], reason: null };
    return { list: null, reason: (body["reason"] as Reason | null) ?? dashboard("no reason given") };
  } catch (error) {
    return { list: null, reason: reasonOf(error) };
  }
}
