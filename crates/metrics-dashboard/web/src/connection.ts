// Whether what the page shows is what is. Pure: told when something came, asked how things stand.

/** A message comes every second: after this long without one the figures are old. */
export const STALE_AFTER_MS = 4_000;
/** After this long nobody is there. */
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
      return { state: "disconnected", text: "No answer from the dashboard service; trying again" };
    }
    const age = now - this.lastMessage;
    const seconds = Math.floor(age / 1000);
    if (age >= LOST_AFTER_MS || (this.broken && age >= STALE_AFTER_MS)) {
      return { state: "disconnected", text: `Disconnected: figures are ${seconds} s old; trying again` };
    }
    if (age >= STALE_AFTER_MS) return { state: "stale", text: `Stale: figures are ${seconds} s old` };
    return { state: "live", text: "Live" };
  }
}
