// The shapes of the service's JSON (GET /api/v1/…). A figure that cannot be known is null; `reasons` says why.

export type Reasons = Record<string, string>;

export interface Partition {
  partition: number;
  low_offset: number | null;
  high_offset: number | null;
  next_offset: number | null;
  events: number | null;
  duplicates: number | null;
  late: number | null;
  dead_letters: number | null;
  lag_messages: number | null;
  lag_seconds: number | null;
  standing: "current" | "behind" | "history_lost" | "beyond_the_end" | null;
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
  ready: boolean | null;
}

export type Listed<T> = { list: T[]; reason: null } | { list: null; reason: string };

/** Fetches JSON from the service; the error says what the service said. */
export async function fetchJson(path: string): Promise<unknown> {
  const answer = await fetch(path, { headers: { accept: "application/json" } });
  const body: unknown = await answer.json().catch(() => null);
  if (answer.ok) return body;
  const said = body !== null && typeof body === "object" && "error" in body ? String(body.error) : `HTTP ${answer.status}`;
  throw new Error(said);
}

/** Fetches one of the lists, whose name is also its key. */
export async function fetchList<T>(name: string): Promise<Listed<T>> {
  try {
    const body = (await fetchJson(`/api/v1/${name}`)) as Record<string, unknown>;
    const list = body[name];
    if (Array.isArray(list)) return { list: list as T[], reason: null };
    return { list: null, reason: String(body["reason"] ?? "no reason given") };
  } catch (error) {
    return { list: null, reason: error instanceof Error ? error.message : String(error) };
  }
}
