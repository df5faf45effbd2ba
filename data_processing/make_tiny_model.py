"""Make a small Qwen2-architecture model with random weights and a character-level tokenizer, in Hugging Face format.

One token per byte, so any text can be put to it. A conversation is written as `<|user|>2+2=<|assistant|>4<|end|>`;
`<|end|>` is the end-of-sequence token.
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from verl.utils import manifest

PAD, END = "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '" + END + "' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FORMAT = 2  # raised when the model made from equal arguments changes


def build_tokenizer(max_length: int = 1024) -> Qwen2Tokenizer:
    """A byte-level BPE without merges. It is of the class that `AutoTokenizer` takes for a Qwen2 model: that class
    rebuilds everything but the vocabulary, so any other alphabet than its byte-level one would lose characters."""
    tokens = [PAD, END, *ROLES, *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,  # never used: every byte is in the vocabulary
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def build_model(
    tokenizer: Qwen2Tokenizer,
    hidden_size: int = 128,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 384,
    seed: int = 1,
) -> Qwen2ForCausalLM:
    """Random float32 weights, input and output embeddings tied; equal arguments give equal weights."""
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,  # a multiple of 8, as kernels like it
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.08,  # a narrow model learns slowly from the usual 0.02
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=True
    )
    return model


def check(arguments: argparse.Namespace) -> None:
    for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give at least 1")
    if arguments.hidden_size % (2 * arguments.heads):
        raise ValueError(
            f"--hidden-size is {arguments.hidden_size}: give a multiple of twice --heads ({2 * arguments.heads}), "
            "since rotary embeddings need an even size per head"
        )
    if arguments.heads % arguments.kv_heads:
        raise ValueError(f"--kv-heads is {arguments.kv_heads}: give a divisor of --heads ({arguments.heads})")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a small random model with a character-level tokenizer.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--intermediate-size", type=int, default=384)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    check(arguments)
    folder: Path = arguments.output_dir
    sizes = {k: v for k, v in vars(arguments).items() if k != "output_dir"}
    made_from = sizes | {"format": FORMAT}
    if manifest.is_made(folder, made_from):
        print(f"{folder}: already made from these arguments")
        return
    disable_progress_bar()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, **sizes)
    manifest.begin(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest.finish(folder, made_from, sorted(p.name for p in folder.iterdir() if p.name != manifest.NAME))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {n_parameters / 1e6:.2f} million parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
