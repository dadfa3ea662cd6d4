"""Package metadata; the pins and their reasons are in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(file: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


TRAIN = ["deepspeed==0.19.8", "tensorboard>=2.20"]
SERVE = [
    "fastapi>=0.128",  # controller and workers
    "uvicorn>=0.40",
    "httpx>=0.28,<1",  # controller to worker, page to controller
    "prometheus-client>=0.22",
    "gradio>=6.31,<7",  # the web page; its gate was made for these routes
]
CLUSTER = ["ray[serve]>=2.60"]
DICOM = [
    *("pylibjpeg>=2.1", "pylibjpeg-openjpeg>=2.5"),  # JPEG 2000
    "python-gdcm>=3.0.24",  # JPEG lossless, JPEG-LS
]

setup(
    name="medplib",
    version="0.1.0",
    description="A biomedical multimodal language model with pixel grounding",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["model", "model.*"]),
    package_data={
        "model.eval": ["*.sh", "templates/*", "lmms_tasks/*"],
        "model.serve.web": ["assets/*"],
    },
    install_requires=requirements("requirements.txt"),
    extras_require={
        "train": TRAIN,  # staged training; deepspeed compiles a small op with g++ at its first run
        "serve": SERVE,
        "cluster": CLUSTER,  # the same engine under Ray Serve
        "dicom": DICOM,  # compressed DICOM transfer syntaxes
        "dev": [
            *(*TRAIN, *SERVE, *CLUSTER, *DICOM),
            *("pytest>=9,<10", "pytest-xdist>=3.8", "ruff==0.17.6", "mypy==2.4.1", "types-PyYAML", "types-tqdm"),
            *("openai>=2", "schemathesis>=4", "playwright>=1.55"),  # drive the servers as their users do
        ],
        # engine.attention=flash_attention_2 (CUDA only: install with --no-build-isolation), lora.quantise
        "gpu": ["flash-attn", "bitsandbytes>=0.45"],
        # Beside lmms-eval itself, which is installed with --no-deps: its own list would replace torch.
        "lmms": [
            *("datasets>=4", "evaluate>=0.4", "loguru", "tenacity>=8.3", "pytablewriter", "sacrebleu"),
        ],
        "sam": ["segment-anything", "torchvision"],  # cross-check of our SAM in the tests; CUDA builds of torch only
    },
    entry_points={
        "console_scripts": ["medplib=model.cli:main"],
        "lmms_eval.models": ["medplib=model.eval.lmms:manifest"],
    },
)
