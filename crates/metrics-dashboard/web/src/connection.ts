// Tracks whether the figures on the page are up to date. Pure: the caller reports messages and errors, and passes the time.

/** The figures are stale after this time without a message. A message arrives every second. */
export const STALE_AFTER_MS = 4_000;
/** The service counts as disconnected after this time without a message. */
export const LOST_AFTER_MS = 12_000;

export type State = "connecting" | "live" | "stale" | "disconnected";

export interface Standing {
  state: State;
  text: string;
}

export class Connection {
  private lastMessage: number | null = null;
  private broken = false;

  constructor(private readonly since: number) {}

  message(now: number): void {
    this.lastMessage = now;
    this.broken = false;
  }

  failed(): void {
    this.broken = true;
  }

  standing(now: number): Standing {
    if (this.lastMessage === null) {
      const waiting = now - this.since;
      if (!this.broken && waiting < STALE_AFTER_MS) return { state: "connecting", text: "Connecting" };
      return { state: "disconnected", text: "No response from the dashboard service; retrying" };
    }
    const age = now - this.lastMessage;
    const seconds = Math.floor(age / 1000);
    if (age >= LOST_AFTER_MS || (this.broken && age >= STALE_AFTER_MS)) {
      return { state: "disconnected", text: `Disconnected: figures are ${seconds} s old; reconnecting` };
    }
    if (age >= STALE_AFTER_MS) return { state: "stale", text: `Stale: figures are ${seconds} s old` };
    return { state: "live", text: "Live" };
  }
}
