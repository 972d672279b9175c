"""``deltaserve serve``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaserve.config import EngineConfig, ServerConfig, load_config, parse_deltas

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
Name = Annotated[
    str | None,
    typer.Option(help="Name of the base in the API. (default: last part of BASE)"),
]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"auto, float32, bfloat16 or float16. (default: {EngineConfig.dtype})"),
]
Device = Annotated[
    str | None, typer.Option(help=f"auto, cpu or cuda. (default: {EngineConfig.device})")
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
MergeBytes = Annotated[
    int | None,
    typer.Option(
        help="Memory for deltas kept merged with the base: faster on a CPU, but each then takes "
        f"a whole model's. (default: {EngineConfig.merge_memory_bytes}, all stay packed)"
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


def run(
    base: Base = None,
    delta: Deltas = None,
    config: Config = None,
    host: Host = None,
    port: Port = None,
    api_key: ApiKey = None,
    served_model_name: Name = None,
    dtype: Dtype = None,
    device: Device = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    block_size: BlockSize = None,
    kv_cache_memory_bytes: KvBytes = None,
    enable_prefix_caching: PrefixCaching = None,
    merge_memory_bytes: MergeBytes = None,
    deterministic: Deterministic = None,
) -> None:
    """Serve a base model and its deltas behind an OpenAI-compatible endpoint."""
    flags = {name: value for name, value in locals().items() if name not in ("delta", "config")}
    settings = load_config(flags | {"deltas": parse_deltas(delta or ())}, config)

    from deltaserve.server.lifecycle import serve  # torch: only once the options are right

    serve(settings)
