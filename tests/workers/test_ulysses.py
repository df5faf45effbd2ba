"""Sequence parallelism on two and four processes against one."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from verl.protocol import DataProto
from verl.workers.attention import use_packed_attention
from verl.workers.model import ScoringModel
from verl.workers.sequences import Layout, MicroBatchSpec, Sequences, micro_batches
from verl.workers.ulysses import check_size, make_group

CPU = torch.device("cpu")


def make_model(heads: int, kv_heads: int) -> ScoringModel:
    config = LlamaConfig(
        hidden_size=8 * heads, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=16, vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = LlamaForCausalLM(config).eval()
    use_packed_attention(lm, "model")
    return ScoringModel(lm)


def make_batch() -> DataProto:
    """Six sequences of uneven lengths, two of which share a prompt; 34 tokens in the packed row."""
    generator = torch.Generator().manual_seed(1)
    prompt_length, response_length = torch.tensor([4, 2, 4, 1, 3, 5]), torch.tensor([9, 1, 2, 6, 1, 7])
    prompts = torch.randint(5, 60, (6, 5), generator=generator)
    prompts[2] = prompts[0]
    return DataProto.from_dict(
        {
            "prompts": prompts * (torch.arange(5) >= 5 - prompt_length[:, None]),
            "prompt_length": prompt_length,
            "responses": torch.randint(5, 60, (6, 9), generator=generator),
            "response_mask": torch.arange(9) < response_length[:, None],
            "advantages": torch.randn(6, 1, generator=generator).expand(6, 9).contiguous(),
        }
    )


def loss_and_gradients(model: ScoringModel, data: DataProto, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """log-probs, entropies, and this process's share of the gradient of a loss of both."""
    sequences = Sequences.from_batch(data, CPU, Layout(packed=True, group=group))
    log_prob, entropy = (sequences.to_rows(values) for values in model(sequences, 0.9))
    (log_prob * data["advantages"] + 0.1 * entropy.square()).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [log_prob.detach(), entropy.detach(), *gradients]


def run(rank: int, world: int, cases: list[tuple[int, int, int]], folder: str) -> None:
    """Of each case (size of a group, heads, KV heads), what each process computes, into `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    results = []
    for size, heads, kv_heads in cases:
        group = make_group(size)
        data = make_batch()
        layout = Layout(packed=True, group=group)
        parts = micro_batches(data, MicroBatchSpec(None, 60 // size), layout)
        results.append(
            (loss_and_gradients(make_model(heads, kv_heads), data, group), [part.tolist() for part in parts])
        )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # starts two or four processes
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [(2, 4, 2), (2, 6, 3), (2, 4, 1)]),
        (4, [(4, 4, 2), (2, 4, 2)]),
    ],
)
def test_log_probs_and_gradients_equal_those_of_one_process(tmp_path, monkeypatch, world, cases):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(run, (world, cases, os.fspath(tmp_path)), nprocs=world)
    of_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for case, (size, heads, kv_heads) in enumerate(cases):
        expected = loss_and_gradients(make_model(heads, kv_heads), make_batch(), None)
        for rank in range(world):
            for value, whole in zip(of_rank[rank][case][0][:2], expected[:2], strict=True):
                torch.testing.assert_close(value, whole, rtol=0, atol=1e-5)
        for first in range(0, world, size):  # the processes of a group add up to the gradient
            shares = [of_rank[rank][case][0][2:] for rank in range(first, first + size)]
            for whole, *parts in zip(expected[2:], *shares, strict=True):
                torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
        # The budget is per process: a group fills a micro-batch with as many tokens as its processes have together.
        assert all(of_rank[rank][case][1] == [[0, 2, 1, 3, 4, 5]] for rank in range(world))


@pytest.mark.parametrize(
    ("size", "workers", "valid"), [(4, 4, "1, 2"), (4, 12, "1, 2, 3, 6"), (0, 4, "1, 2"), (2, 3, "1, 3")]
)
def test_a_size_that_does_not_divide_heads_and_workers_is_refused(size, workers, valid):
    lm = make_model(6, 3).lm
    check_size(lm.config, 1, workers)
    with pytest.raises(
        ValueError, match=f"actor.ulysses_sequence_parallel_size={size} .* 6 attention heads .*{valid}$"
    ):
        check_size(lm.config, size, workers)
