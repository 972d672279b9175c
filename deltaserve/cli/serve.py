"""``deltaserve serve``."""

from __future__ import annotations

from deltaserve.cli import serve_options as options
from deltaserve.config_sources import load_config, parse_deltas


def run(
    base: options.Base = None,
    delta: options.Deltas = None,
    config: options.Config = None,
    host: options.Host = None,
    port: options.Port = None,
    api_key: options.ApiKey = None,
    admin_key: options.AdminKey = None,
    tenants: options.Tenants = None,
    state_dir: options.StateDir = None,
    delta_root: options.DeltaRoots = None,
    delta_url: options.DeltaUrls = None,
    max_delta_bytes: options.MaxDelta = None,
    log_format: options.LogFormat = None,
    otlp_traces_endpoint: options.OtlpEndpoint = None,
    engine_process: options.EngineProcess = None,
    engine_hang_s: options.EngineHang = None,
    drain_timeout_s: options.DrainTimeout = None,
    request_timeout_s: options.RequestTimeout = None,
    max_body_bytes: options.MaxBody = None,
    tool_call_parser: options.ToolCallParser = None,
    served_model_name: options.Name = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantization: options.Quantization = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    block_size: options.BlockSize = None,
    kv_cache_memory_bytes: options.KvBytes = None,
    gpu_memory_utilization: options.GpuShare = None,
    enable_prefix_caching: options.PrefixCaching = None,
    delta_memory_bytes: options.DeltaBytes = None,
    host_memory_bytes: options.HostBytes = None,
    merge_memory_bytes: options.MergeBytes = None,
    load_timeout_s: options.LoadTimeout = None,
    scheduling_policy: options.Policy = None,
    max_queued_requests: options.QueuedRequests = None,
    max_queued_tokens: options.QueuedTokens = None,
    slo_tpot_ms: options.SloTpot = None,
    max_wait_s: options.MaxWait = None,
    share_prefixes_between_tenants: options.SharePrefixes = None,
    deterministic: options.Deterministic = None,
    enforce_eager: options.EnforceEager = None,
) -> None:
    """Serve a base model and its deltas behind an OpenAI-compatible endpoint."""
    flags = dict(locals())
    for name in ("delta", "delta_root", "delta_url", "config"):
        del flags[name]
    lists = {
        "deltas": parse_deltas(delta or ()),
        "delta_roots": delta_root or None,
        "delta_urls": delta_url or None,
    }
    settings = load_config(flags | lists, config)

    from deltaserve.server.lifecycle import serve  # torch: only once the options are right

    serve(settings)
