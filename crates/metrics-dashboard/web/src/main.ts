// The entry point of the page: follows the feed, fetches the chart and the lists, and shows when the figures are stale.

import "uplot/dist/uPlot.min.css";
import "./style.css";
import { fetchJson, fetchList, reasonOf, type Chart, type Instance, type Overview, type Run } from "./api";
import { ThroughputChart } from "./chart";
import { Connection } from "./connection";
import { inWords } from "./series";
import { showChart, showConnection, showOverview, showRuns, showServices } from "./view";

/** The browser reconnects automatically unless a response is not an event stream. The page then reconnects after this time. */
const REOPEN_MS = 5_000;
const LISTS_MS = 1_000;
/** Refresh interval of a chart of at most `LIVE_MINUTES`. A longer chart changes slowly and is refreshed less often. */
const CHART_MS = 2_000;
const LONG_CHART_MS = 30_000;
const LIVE_MINUTES = 60;

const connection = new Connection(performance.now());

function follow(): void {
  const feed = new EventSource("/api/v1/stream");
  feed.addEventListener("overview", (event: MessageEvent<string>) => {
    connection.message(performance.now());
    showConnection(connection.standing(performance.now()));
    showOverview(JSON.parse(event.data) as Overview);
  });
  feed.addEventListener("error", () => {
    connection.failed();
    if (feed.readyState === EventSource.CLOSED) setTimeout(follow, REOPEN_MS);
  });
}

/**
 * Calls `work` repeatedly, with a pause of `pause()` milliseconds after each call, and immediately when the page becomes
 * visible again. Returns a function that triggers an immediate call.
 */
function repeat(work: () => Promise<void>, pause: () => number): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let turn = 0;
  const run = async (): Promise<void> => {
    const mine = ++turn;
    clearTimeout(timer);
    if (!document.hidden) await work().catch(() => undefined);
    if (mine === turn) timer = setTimeout(() => void run(), pause());
  };
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) void run();
  });
  void run();
  return () => void run();
}

async function refreshLists(): Promise<void> {
  const [runs, services] = await Promise.all([fetchList<Run>("runs"), fetchList<Instance>("services")]);
  showRuns(runs, Date.now());
  showServices(services, Date.now());
}

function minutesChosen(): number {
  return Number(document.querySelector<HTMLInputElement>('input[name="minutes"]:checked')?.value ?? 15);
}

function startChart(): ThroughputChart {
  const chart = new ThroughputChart(document.getElementById("chart") as HTMLElement);
  const refresh = async (): Promise<void> => {
    const minutes = minutesChosen();
    try {
      const answer = (await fetchJson(`/api/v1/throughput?minutes=${minutes}`)) as Chart;
      if (minutes !== minutesChosen()) return;
      chart.show(answer.points);
      showChart(inWords(answer.points, minutes), null);
    } catch (error) {
      chart.show([]);
      showChart("", reasonOf(error));
    }
  };
  const again = repeat(refresh, () => (minutesChosen() <= LIVE_MINUTES ? CHART_MS : LONG_CHART_MS));
  for (const choice of document.querySelectorAll('input[name="minutes"]')) choice.addEventListener("change", again);
  return chart;
}

function startTheme(chart: ThroughputChart): void {
  const button = document.getElementById("theme") as HTMLButtonElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = (): boolean => (document.documentElement.dataset["theme"] ?? (system.matches ? "dark" : "light")) === "dark";
  const show = (): void => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    chart.repaint();
  };
  const kept = localStorage.getItem("theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset["theme"] = kept;
  button.addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    document.documentElement.dataset["theme"] = next;
    localStorage.setItem("theme", next);
    show();
  });
  system.addEventListener("change", show);
  show();
}

startTheme(startChart());
follow();
repeat(refreshLists, () => LISTS_MS);
setInterval(() => showConnection(connection.standing(performance.now())), 500);
