// The last minutes of the server, as this page saw them: readings of /metrics, and what they mean
// as rates and quantiles.

import { between, histogram, parse, quantile, sum } from "./prometheus.js";

export const KEPT_SECONDS = 300;
export const WINDOW_SECONDS = 30; // of requests that a quantile speaks of
const GAP_SECONDS = 10; // readings further apart are not joined

const HISTOGRAMS = {
  ttft: "vllm:time_to_first_token_seconds",
  itl: "vllm:inter_token_latency_seconds",
};

let readings = [];
export let points = [];

export function reset() {
  readings = [];
  points = [];
}

export function add(source, now = Date.now() / 1000) {
  const reading = read(parse(source), now);
  const last = readings.at(-1);
  if (last && reading.generated < last.generated) readings = []; // the server began anew
  readings = [...readings.filter(({ time }) => time > now - KEPT_SECONDS), reading];
  const fresh = point(reading, readings.at(-2));
  const gap = last && now - last.time > GAP_SECONDS ? [{ time: last.time + 1 }] : [];
  points = [...points, ...gap, fresh].filter(({ time }) => time > now - KEPT_SECONDS);
  return fresh;
}

function read(metrics, time) {
  const gauge = (name) => sum(metrics, name);
  const tier = (name, tier) => sum(metrics, `deltaserve:${name}`, { tier });
  const tiers = ["device", "merged", "host"].map((name) => ({
    name,
    used: tier("tier_bytes", name),
    limit: tier("tier_limit_bytes", name),
  }));
  return {
    time,
    generated: gauge("vllm:generation_tokens_total"),
    prompted: gauge("vllm:prompt_tokens_total"),
    running: gauge("vllm:num_requests_running"),
    waiting: gauge("vllm:num_requests_waiting"),
    kv: gauge("vllm:kv_cache_usage_perc"),
    finished: gauge("vllm:request_success_total"),
    refused: gauge("vllm:admission_rejections_total"),
    onDevice: tier("deltas", "device"),
    deltas: gauge("deltaserve:deltas"),
    tiers,
    ttft: histogram(metrics, HISTOGRAMS.ttft),
    itl: histogram(metrics, HISTOGRAMS.itl),
  };
}

function point(reading, last) {
  const rate = (name) => {
    if (!last || reading.time - last.time > GAP_SECONDS) return null;
    return Math.max(0, reading[name] - last[name]) / (reading.time - last.time);
  };
  const start = readings.find(({ time }) => time >= reading.time - WINDOW_SECONDS) ?? reading;
  const of = (name, q) => quantile(between(start[name], reading[name]), q);
  return {
    ...reading,
    tokensPerSecond: rate("generated"),
    promptPerSecond: rate("prompted"),
    ttft50: of("ttft", 0.5),
    ttft95: of("ttft", 0.95),
    itl50: of("itl", 0.5),
    itl95: of("itl", 0.95),
  };
}
