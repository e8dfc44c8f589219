from setuptools import find_packages, setup

setup(
    name="fourm",
    version="0.1.0",
    description="Training codebase for any-to-any multimodal masked models (4M)",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fourm", "fourm.*"]),
    package_data={"fourm.utils.tokenizer": ["trained/*.json"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "numpy>=1.26",
        "pyyaml",
        "webdataset>=0.2.86",
        "boto3",
        "einops",
        "timm>=1.0",
        "wandb",
        "tokenizers>=0.15",
        "safetensors>=0.4",
        "huggingface_hub>=0.23",
        "tqdm",
        "pillow>=10.0",
        "braceexpand",
    ],
    extras_require={
        "demo": ["pybullet", "scikit-image", "matplotlib"],
        "dev": ["pytest>=8", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "types-tqdm"],
    },
)
