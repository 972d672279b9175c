"""The options of ``deltaserve serve``, in the order of its help. None is not given: then the file
says it, or the default of ``config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaserve.config import EngineConfig, ServerConfig

Base = Annotated[
    str | None,
    typer.Argument(
        metavar="BASE", help="Directory or hub id of the base model.", show_default=False
    ),
]
Deltas = Annotated[
    list[str] | None,
    typer.Option("--delta", metavar="NAME=PATH", help="A delta to serve as NAME. Repeat it."),
]
Config = Annotated[
    Path | None, typer.Option(help="YAML file with these options; flags win over it.")
]
Host = Annotated[
    str | None,
    typer.Option(help=f"Address; others than loopback need a key. (default: {ServerConfig.host})"),
]
Port = Annotated[
    int | None, typer.Option(help=f"0 picks a free one. (default: {ServerConfig.port})")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="DELTASERVE_API_KEY",
        help="Key that clients must send. Prefer the variable: flags show in process lists.",
    ),
]
EngineProcess = Annotated[
    bool | None,
    typer.Option(
        "--engine-process/--no-engine-process",
        help="Run the engine in a process of its own, and start it again if it crashes. "
        "(default: on)",
        show_default=False,
    ),
]
EngineHang = Annotated[
    float | None,
    typer.Option(
        help="Seconds without a sign of life after which a busy engine is replaced; longer than "
        f"any step. (default: {ServerConfig.engine_hang_s:g})"
    ),
]
DrainTimeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds that requests in flight may take once the server is told to stop. "
        f"(default: {ServerConfig.drain_timeout_s:g})"
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        envvar="DELTASERVE_ADMIN_KEY",
        help="Key for tenants, deltas and metrics; without it there is no management.",
    ),
]
Tenants = Annotated[
    str | None, typer.Option(metavar="FILE", help="YAML file of tenants, their keys and limits.")
]
StateDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where registry, tenants and usage are kept."),
]
DeltaRoots = Annotated[
    list[str] | None,
    typer.Option(
        "--delta-root", metavar="DIR", help="Deltas may be loaded from here at run time. Repeat it."
    ),
]
DeltaUrls = Annotated[
    list[str] | None,
    typer.Option(
        "--delta-url",
        metavar="URL",
        help="Deltas may be fetched at run time from addresses that begin so: s3://, gs://, az://, "
        "https:// or http://. Repeat it.",
    ),
]
MaxDelta = Annotated[
    int | None,
    typer.Option(
        help="Bytes of the largest delta that is fetched. "
        f"(default: {ServerConfig.max_delta_bytes})"
    ),
]
LogFormat = Annotated[
    str | None,
    typer.Option(help=f"Lines for people (text) or json. (default: {ServerConfig.log_format})"),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Send traces of requests here, by OTLP over HTTP."),
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds that a request may take until its answer has ended. "
        f"(default: {ServerConfig.request_timeout_s:g})"
    ),
]
MaxBody = Annotated[
    int | None,
    typer.Option(help=f"Bytes of the largest request. (default: {ServerConfig.max_body_bytes})"),
]
ToolCallParser = Annotated[
    str | None,
    typer.Option(
        help="Format of the models' tool calls: hermes, llama3_json, mistral, or auto, as each "
        f"chat template shows. (default: {ServerConfig.tool_call_parser})"
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="Name of the base in the API. (default: last part of BASE)"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto, float32, bfloat16 or float16; auto is the checkpoint's own, or float32 on "
        f"processors that cannot compute in it. (default: {EngineConfig.dtype})"
    ),
]
Device = Annotated[
    str | None, typer.Option(help=f"auto, cpu or cuda. (default: {EngineConfig.device})")
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Hold the base at 4 bits (bitsandbytes) or 8 (bitsandbytes-int8), or none. "
        f"(default: {EngineConfig.quantization})"
    ),
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest prompt and answer together. (default: the model's)")
]
MaxNumSeqs = Annotated[
    int | None, typer.Option(help=f"Requests in one batch. (default: {EngineConfig.max_num_seqs})")
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(help=f"Tokens in one step. (default: {EngineConfig.max_num_batched_tokens})"),
]
BlockSize = Annotated[
    int | None, typer.Option(help=f"Tokens in a KV block. (default: {EngineConfig.block_size})")
]
KvBytes = Annotated[
    int | None, typer.Option(help="Memory of the KV cache. (default: chosen by the engine)")
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Share computed beginnings between requests of one model. (default: on)",
        show_default=False,
    ),
]
DeltaBytes = Annotated[
    int | None,
    typer.Option(help="Memory of the device for deltas. (default: chosen by the engine)"),
]
HostBytes = Annotated[
    int | None,
    typer.Option(
        help="Memory for deltas that were read but do not fit on the device. "
        "(default: chosen by the engine)"
    ),
]
LoadTimeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds that reading a delta may take; then its requests end with an error. "
        f"(default: {EngineConfig.load_timeout_s:g})"
    ),
]
MergeBytes = Annotated[
    int | None,
    typer.Option(
        help="Memory for deltas kept merged with the base as well: faster on a CPU, but each then "
        "takes a whole model's. (default: on a CPU a quarter of what is free, for those that "
        "traffic shows to be worth it; on a GPU none)"
    ),
]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="Answers are the same to the bit, whatever shares the batch. Several times slower. "
        "(default: off)",
        show_default=False,
    ),
]
GpuShare = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        help="Share of a GPU's memory that may be used. "
        f"(default: {EngineConfig.gpu_memory_utilization})",
    ),
]
EnforceEager = Annotated[
    bool | None,
    typer.Option(
        "--enforce-eager/--no-enforce-eager",
        help="On a GPU, do without CUDA graphs: slower, but starts sooner and takes less memory. "
        "(default: off)",
        show_default=False,
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(help=f"fcfs, priority or vtc. (default: {EngineConfig.scheduling_policy})"),
]
QueuedRequests = Annotated[
    int | None,
    typer.Option(
        help="Requests that may wait; more are refused. "
        f"(default: {EngineConfig.max_queued_requests})"
    ),
]
QueuedTokens = Annotated[
    int | None, typer.Option(help="Prompt tokens that may wait. (default: no limit)")
]
SloTpot = Annotated[
    float | None,
    typer.Option(help="Milliseconds per output token to be kept. (default: as many as fit run)"),
]
MaxWait = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which a tenant's oldest request goes first. "
        f"(default: {EngineConfig.max_wait_s:g})"
    ),
]
SharePrefixes = Annotated[
    bool | None,
    typer.Option(
        "--share-prefixes-between-tenants/--no-share-prefixes-between-tenants",
        help="Tenants may use what was computed for others. (default: off)",
        show_default=False,
    ),
]
