"""What runs in a tool's own environment: one tool, every exported model, nothing of ours imported.

    python inside.py TOOL FOLDER OUT

FOLDER holds <variant>/final and <variant>/reference.json, or is a run's directory (then the result
has `curves`: [step, value] pairs by TensorBoard's tag); OUT receives JSON by variant: `ids` of
the reference's texts by the tool's own tokenizer, `log_probabilities` of their tokens (or their
sums), `greedy` ids (or texts), under `others` the log-probabilities in other settings; or `error`.
A key is left out where the tool does not give it.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
NEW_TOKENS = 24


def rows(reference: Result, key: str) -> list[list[int]]:
    """Token ids of the texts or prompts, the beginning token first."""
    return [[0, *entry["ids"]] for entry in reference[key]]


def texts(reference: Result, key: str) -> list[str]:
    return [entry["text"] for entry in reference[key]]


def of_logits(logits: Any, row: Sequence[int]) -> list[float]:
    """Log-probabilities of row[1:] from (T, V) logits of row[:-1] or of the whole row."""
    import numpy as np

    log_p = np.asarray(logits, dtype=np.float64)[: len(row) - 1]
    log_p = log_p - log_p.max(axis=1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    return [float(log_p[i, token]) for i, token in enumerate(row[1:])]


def _transformers(final: Path, reference: Result) -> Result:
    from transformers import AutoModelForCausalLM

    return _like_transformers(AutoModelForCausalLM.from_pretrained(final), final, reference)


def _like_transformers(model: Any, final: Path, reference: Result) -> Result:
    """Prompts as one padded batch, so that the padding's side counts."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(final)
    scores = []
    for row in rows(reference, "texts"):
        inputs = torch.tensor([row])
        with torch.no_grad():
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
        scores.append(of_logits(logits[0].float().numpy(), row))
    batch = tokenizer.pad({"input_ids": rows(reference, "prompts")}, return_tensors="pt")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    generated = model.generate(**batch, **options)
    # The call of a user who has no ids: fails where the tokenizer hands over too much.
    model.generate(**tokenizer("a text", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    return {
        "ids": tokenizer(texts(reference, "texts")).input_ids,
        "log_probabilities": scores,
        "greedy": generated[:, batch["input_ids"].shape[1] :].tolist(),
    }


def _vllm(final: Path, reference: Result) -> Result:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    def run(**settings: Any) -> tuple[Any, list[list[float]]]:
        model = LLM(model=str(final), max_model_len=128, enforce_eager=True, **settings)
        inputs = [{"prompt_token_ids": row} for row in rows(reference, "texts")]
        outputs = model.generate(inputs, SamplingParams(max_tokens=1, prompt_logprobs=0))
        return model, [
            [step[token].logprob for step, token in zip(out.prompt_logprobs[1:], row[1:])]  # noqa: B905
            for out, row in zip(outputs, rows(reference, "texts"))  # noqa: B905
        ]

    model, scores = run(dtype="float32")
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    inputs = [{"prompt_token_ids": row} for row in rows(reference, "prompts")]
    generated = [list(out.outputs[0].token_ids) for out in model.generate(inputs, greedy)]
    ids = [model.get_tokenizer().encode(text) for text in texts(reference, "texts")]
    del model
    result = {"ids": ids, "log_probabilities": scores, "greedy": generated}
    if final.parent.name == "tied":  # an engine takes long to start: one model shows it
        result["others"] = {"dtype not given": run()[1]}
    return result


def _llama_cpp(final: Path, reference: Result) -> Result:
    """The converter of llama.cpp's own sources, then f32, f16, q8_0 and q4_K_M."""
    import llama_cpp

    folder = final.parent / "gguf"
    folder.mkdir(exist_ok=True)
    exact_gguf = folder / "f32.gguf"
    sources = Path(sys.executable).parents[1] / "sources"
    # Its own answer to an unknown tokenizer is an exception that asks for the name.
    program = (
        "import sys, runpy; from conversion.base import TextModel; "
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'; "
        f"sys.argv = ['convert', {str(final)!r}, '--outfile', {str(exact_gguf)!r}, "
        "'--outtype', 'f32']; "
        "runpy.run_path('convert_hf_to_gguf.py', run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", program], cwd=sources, check=True, capture_output=True)
    own_gguf = folder / "ours.gguf"
    script = Path(__file__).resolve().parents[2] / "scripts" / "export_gguf.py"
    subprocess.run([sys.executable, str(script), str(final), str(own_gguf)], check=True)

    def open_model(path: Path, **settings: Any) -> Any:
        fixed = {"n_ctx": 128, "n_batch": 128, "logits_all": True, "n_threads": 1}
        return llama_cpp.Llama(str(path), verbose=False, **fixed, **settings)

    def scores(model: Any) -> list[list[float]]:
        rows_scores = []
        for row in rows(reference, "texts"):
            model.reset()
            model.eval(row)
            rows_scores.append(of_logits(model.scores[: len(row)], row))
        return rows_scores

    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}  # GGML_TYPE_F32
    model = open_model(exact_gguf, **exact)
    name = model.metadata["general.name"]
    result: Result = {"log_probabilities": scores(model), "facts": {"name": name}}
    result["ids"] = [
        model.tokenize(text.encode(), add_bos=False, special=False)
        for text in texts(reference, "texts")
    ]
    result["greedy"] = []
    for row in rows(reference, "prompts"):
        model.reset()
        generated = model.generate(row, temp=0.0, repeat_penalty=1.0)
        result["greedy"].append(list(itertools.islice(generated, NEW_TOKENS)))
    others = {"f32, default cache": scores(open_model(exact_gguf))}
    others["scripts/export_gguf.py"] = scores(open_model(own_gguf, **exact))
    for name, file_type in {"f16": 1, "q8_0": 7, "q4_K_M": 15}.items():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = file_type
        smaller = folder / f"{name}.gguf"
        failed = llama_cpp.llama_model_quantize(
            str(exact_gguf).encode(), str(smaller).encode(), llama_cpp.ctypes.byref(settings)
        )
        if failed:
            raise RuntimeError(f"llama_model_quantize gives {failed} for {name}")
        others[name] = scores(open_model(smaller, **exact))
    return result | {"others": others}


def _onnxruntime(final: Path, reference: Result) -> Result:
    from optimum.onnxruntime import ORTModelForCausalLM

    config = json.loads((final / "config.json").read_bytes())
    # With a cache, optimum takes hidden_size / heads for the width of a head.
    plain = config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    settings = {} if plain else {"use_cache": False, "use_io_binding": False}
    model = ORTModelForCausalLM.from_pretrained(final, export=True, **settings)
    return _like_transformers(model, final, reference) | {"facts": {"cache": plain}}


def _openvino(final: Path, reference: Result) -> Result:
    from optimum.intel import OVModelForCausalLM

    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    exact = OVModelForCausalLM.from_pretrained(final, export=True, ov_config=settings)
    result = _like_transformers(exact, final, reference)
    default = OVModelForCausalLM.from_pretrained(final, export=True)
    scores = _like_transformers(default, final, reference)["log_probabilities"]
    return result | {"others": {"precision not given": scores}}


def _ctranslate2(final: Path, reference: Result) -> Result:
    import ctranslate2

    folder = final.parent / "ct2"
    ctranslate2.converters.TransformersConverter(str(final)).convert(str(folder), force=True)
    model = ctranslate2.Generator(str(folder), device="cpu", intra_threads=1)
    vocabulary = json.loads((folder / "vocabulary.json").read_bytes())

    def tokens(key: str) -> list[list[str]]:
        return [[vocabulary[i] for i in row] for row in rows(reference, key)]

    scored = model.score_batch(tokens("texts"))
    options = {"max_length": NEW_TOKENS, "beam_size": 1, "end_token": []}
    generated = model.generate_batch(tokens("prompts"), include_prompt_in_result=False, **options)
    return {
        "log_probabilities": [result.log_probs for result in scored],
        "greedy": [list(result.sequences_ids[0]) for result in generated],
    }


def _lm_eval(final: Path, reference: Result) -> Result:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(final), device="cpu", dtype="float32", batch_size=4)

    def request(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        instances = [
            Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
        ]
        return getattr(model, kind)(instances)

    strings = texts(reference, "texts")
    settings = {"until": [], "do_sample": False, "max_gen_toks": NEW_TOKENS}
    return {
        "ids": [model.tok_encode(text) for text in strings],
        "sums": [score for score, _ in request("loglikelihood", [("", text) for text in strings])],
        "other_sums": {"rolling": request("loglikelihood_rolling", [(text,) for text in strings])},
        "greedy_texts": request(
            "generate_until", [(text, settings) for text in texts(reference, "prompts")]
        ),
    }


def _minicons(final: Path, reference: Result) -> Result:
    from minicons import scorer

    model = scorer.IncrementalLMScorer(str(final), "cpu")
    # It spells the beginning token in the text, which our tokenizer reads as a text unless told.
    model.tokenizer.split_special_tokens = False
    token = model.tokenizer.bos_token
    strings = texts(reference, "texts")
    scored = [text for text in strings if token not in text]
    pairs = iter(model.token_score(scored, bos_token=True, decode=False))
    scores = [None if token in text else [s for _, s in next(pairs)][1:] for text in strings]
    return {"log_probabilities": scores}


def _mistralrs(final: Path, reference: Result) -> Result:
    from mistralrs import CompletionRequest, ModelDType, Runner, Which

    runner = Runner(which=Which.Plain(model_id=str(final), arch=None, dtype=ModelDType.F32))

    def continued(text: str) -> str:
        request = CompletionRequest(
            model="final", prompt=text, max_tokens=NEW_TOKENS, temperature=0.0, top_k=1
        )
        return runner.send_completion_request(request).choices[0].text

    return {"greedy_texts": [continued(text) for text in texts(reference, "prompts")]}


def logged(run: Path) -> dict[str, list[list[float]]]:
    """What metrics.jsonl has for two of the curves: [step, value] pairs by TensorBoard's tag."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{kind}/loss": [[row["step"], row[f"{kind}_loss"]] for row in lines if row["kind"] == kind]
        for kind in ("train", "dev")
    }


def _tensorboard(run: Path) -> Result:
    """The server itself, asked over HTTP as its page does."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--logdir", str(run.parent), "--port", str(port)]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    scalars = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars"
    query = f"?run={run.name}%2Ftensorboard&tag="
    try:
        return {"curves": {tag: _fetch_points(scalars + query + tag) for tag in logged(run)}}
    finally:
        server.terminate()
        server.wait(30)


def _fetch_points(address: str) -> list[list[float]]:
    from urllib.request import urlopen

    for _ in range(120):  # the server needs a while to start and to read
        try:
            with urlopen(address) as response:
                return [[step, value] for _, step, value in json.load(response)]
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"{address}: no answer for two minutes")


def _trackio(run: Path) -> Result:
    os.environ["TRACKIO_DIR"] = str(run.parent / "trackio")
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    trackio.import_tf_events(str(run / "tensorboard"), project="tried", name=run.name)
    rows = SQLiteStorage.get_logs("tried", f"{run.name}_main")
    curves = {tag: [[row["step"], row[tag]] for row in rows if tag in row] for tag in logged(run)}
    return {"curves": curves}


def _mlflow(run: Path) -> Result:
    """The loop of docs/INTEROP.md, and the values asked back."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{run.parent / 'mlflow.db'}")
    with mlflow.start_run(run_name=run.name) as active:
        for line in map(json.loads, (run / "metrics.jsonl").open()):
            numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
            mlflow.log_metrics(numbers, step=line["step"])
    client = mlflow.MlflowClient()
    curves = {}
    for tag in logged(run):
        points = client.get_metric_history(active.info.run_id, tag.replace("/", "_"))
        curves[tag] = [[point.step, point.value] for point in points]
    return {"curves": curves}


TOOLS = (
    _transformers, _vllm, _llama_cpp, _onnxruntime, _openvino, _ctranslate2, _lm_eval, _minicons,
    _mistralrs, _tensorboard, _trackio, _mlflow,
)  # fmt: skip


def main() -> None:
    """Goes on where OUT ends: a variant that killed the process is written as begun."""
    tool, folder, out = sys.argv[1], Path(sys.argv[2]).resolve(), Path(sys.argv[3])
    results = json.loads(out.read_bytes()) if out.exists() else {}
    function = {each.__name__[1:]: each for each in TOOLS}[tool]
    if (folder / "metrics.jsonl").exists():
        out.write_text(json.dumps({"run": function(folder)}), encoding="utf-8")
        return
    for path in sorted(folder.glob("*/reference.json")):
        name = path.parent.name
        if name in results:
            continue
        results[name] = {"error": "the process died"}
        out.write_text(json.dumps(results), encoding="utf-8")
        try:
            results[name] = function(path.parent / "final", json.loads(path.read_bytes()))
        except Exception as error:  # of any tool, of any type: it is the result
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            results[name] = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
        out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
