"""SmallBench: its numbers have known answers, and guessing gets chance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from src.data.requests import encode_requests
from src.data.tasks import Task, load_tasks
from src.evaluation.smallbench import evaluate, evaluate_untrained, score_requests
from src.evaluation.task_scores import credit
from tests.evaluation import make_task, toy_rows, write_rows
from tests.evaluation.models import small_transformer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level, without merges but for two, so that lengths are easy to count."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "Ġb"]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


class ConstantModel:
    """The same logits for every token of every text."""

    def __init__(self, value: float = 0.0) -> None:
        self.row = torch.full((1, 300), value)

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ torch.zeros(1, 300) + self.row


class FavouriteModel(ConstantModel):
    """Prefers some tokens, whatever came before."""

    def __init__(self, preferences: dict[int, float]) -> None:
        super().__init__()
        for token, logit in preferences.items():
            self.row[0, token] = logit


def run(model: Any, tokenizer: Tokenizer, tasks: list[Task], directory: Path, **changes: Any):
    options = {"context": 128, "device": "cpu", "autocast_dtype": None} | changes
    return evaluate(model, tokenizer, tasks, directory, **options)


# ---------------------------------------------------------------------------------------- numbers


def test_a_scorer_without_preference_gets_exactly_chance() -> None:
    """Gold always first (BLiMP), always last (SciQ) or anywhere: 1/k of it each time."""
    for k in (2, 3, 4, 6):
        for gold in range(k):
            assert credit(np.full(k, -3.7), gold) == 1 / k
    assert credit(np.array([-1.0, -1.0, -2.0]), 1) == 0.5
    assert credit(np.array([-1.0, -1.0, -2.0]), 2) == 0.0


@pytest.mark.parametrize("gold", ["0", "1", "{{ label }}"])
@pytest.mark.parametrize("value", [0.0, 0.1, -31.7])
def test_constant_logits_canary(
    gold: str, value: float, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Classification, minimal pairs without a prompt, and multiple choice: exactly chance."""
    rows = [{**row, "x": f" {i % 7}", "y": f" {i % 5}"} for i, row in enumerate(toy_rows(41))]
    tasks = [
        make_task(name="labels", gold=gold),
        make_task(name="pairs", gold=gold, prompt="", choices=("{{ x }}", "{{ y }}")),
        make_task(name="choice", gold=gold, choices=("{{ x }}", "{{ y }}")),
    ]
    for task in tasks:
        write_rows(tmp_path, task.name, rows)
    result = run(ConstantModel(value), tokenizer, tasks, tmp_path)
    assert result["accuracy"] == 0.5
    for row in result["tasks"].values():
        assert row["accuracy"] == row["accuracy_norm"] == row["chance"] == 0.5
        assert row["accuracy_uniform"] == 0.5
        assert row["accuracy_calibrated"] in (0.5, None)
        assert row["ties"] == row["n"] == 41
        assert row["gold_margin"] == 0.0


def test_not_a_number_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_rows(tmp_path, "toy", toy_rows(4))
    with pytest.raises(ValueError, match="not finite"):
        run(ConstantModel(math.nan), tokenizer, [make_task()], tmp_path)
    with pytest.raises(ValueError, match="finite"):
        credit(np.array([0.0, math.nan]), 0)


def test_a_label_bias_is_calibrated_away(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The model always prefers b: raw accuracy is b's share, calibrated credit is a guess."""
    token_b = tokenizer.token_to_id("Ġb")
    write_rows(tmp_path, "toy", toy_rows(40))
    row = run(FavouriteModel({token_b: 5.0}), tokenizer, [make_task()], tmp_path)["tasks"]["toy"]
    assert (row["accuracy"], row["accuracy_calibrated"]) == (0.5, 0.5)
    assert row["majority"] == 0.5 and row["ties"] == 0
    assert row["gold_margin"] == pytest.approx(0.0, abs=1e-5)
    assert row["gold_margin_se"] == pytest.approx(5 * math.sqrt(40 / 39) / math.sqrt(40))
    always_b = make_task(gold="1")
    row = run(FavouriteModel({token_b: 5.0}), tokenizer, [always_b], tmp_path)["tasks"]["toy"]
    assert (row["accuracy"], row["accuracy_calibrated"], row["majority"]) == (1.0, 0.5, 1.0)
    assert row["accuracy_se"] == 0.0
    assert row["gold_margin"] == pytest.approx(5.0, abs=1e-5)


def test_length_decides_for_a_uniform_model_and_is_normalised_away(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_rows(tmp_path, "toy", toy_rows(10))
    task = make_task(choices=("cccc", "cc"), gold="1", prompt="{{ q }}:", target_delimiter="")
    row = run(ConstantModel(), tokenizer, [task], tmp_path)["tasks"]["toy"]
    assert row["accuracy"] == row["accuracy_uniform"] == 1.0  # fewer tokens
    assert row["accuracy_norm"] == 0.5  # a token is a character here
    assert row["gold_margin"] == pytest.approx(2 * math.log(300), rel=1e-5)


def test_last_word_task(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "so it goes a"}, {"text": "so it goes b"}, {"text": "and so a"}]
    write_rows(tmp_path, "last", rows)
    task = make_task(
        name="last", prompt="{{ text.split(' ')[:-1] | join(' ') }}", gold="0", chance=0.0,
        choices=("{{ text.split(' ')[-1] }}",), metrics=("accuracy", "perplexity"),
    )  # fmt: skip
    model = FavouriteModel({tokenizer.token_to_id("Ġa"): 5.0})
    row = run(model, tokenizer, [task], tmp_path)["tasks"]["last"]
    log_z = math.log(299 + math.exp(5))
    assert row["accuracy"] == pytest.approx(2 / 3) and row["chance"] == 0.0
    assert row["gold_logprob"] == pytest.approx(10 / 3 - log_z, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(log_z - 10 / 3), rel=1e-5)
    assert "accuracy_norm" not in row


def test_groups_weigh_as_one_task(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_rows(tmp_path, "alone", toy_rows(40))
    for name in ("one", "two"):
        write_rows(tmp_path, name, toy_rows(40))
    tasks = [
        make_task(name="alone", gold="1"),
        make_task(name="one", group="pair"),
        make_task(name="two", group="pair", gold="0"),
    ]
    model = FavouriteModel({tokenizer.token_to_id("Ġb"): 5.0})
    result = run(model, tokenizer, tasks, tmp_path)
    pair = result["tasks"]["pair"]
    assert (pair["accuracy"], pair["n"]) == (0.25, 80)
    assert result["accuracy"] == (1.0 + 0.25) / 2
    se = 0.5 * math.sqrt(40 / 39) / math.sqrt(40)  # of `one`; the others never vary
    assert pair["accuracy_se"] == pytest.approx(se / 2)
    assert result["accuracy_se"] == pytest.approx(se / 4)
    assert pair["members"]["one"]["accuracy"] == 0.5


# ---------------------------------------------------------------------------- tokens and log-probs


def test_requests_are_encoded_as_the_harness_does(tokenizer: Tokenizer) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text).ids)

    pairs = [("x", " a"), ("", " a"), ("x  ", "a"), ("x", "yz"), ("  ", "a")]
    requests = encode_requests(tokenizer, pairs)
    assert [(r.ids, r.context) for r in requests] == [
        (ids("x a"), 1),
        ((0, *ids(" a")), 1),  # empty: the beginning-of-text token
        (ids("x  a"), 1),  # the context's blanks belong to the continuation
        (ids("xyz"), 1),
        ((0, *ids("  a")), 1),
    ]
    assert len(requests[0].ids) == 2 and len(requests[2].ids) == 3
    with pytest.raises(ValueError, match="target_delimiter"):
        encode_requests(tokenizer, [("a", "")])


def test_scores_are_the_models_log_probabilities(tokenizer: Tokenizer) -> None:
    """Shared prefixes, cut prompts and a continuation longer than the context."""
    model = small_transformer(300)
    context = 12
    pairs = [("why", " a"), ("why", " b"), ("why", " ab"), ("", " so")]
    pairs += [("p" * 30, " cd"), ("q", 40 * "z")]
    requests = encode_requests(tokenizer, pairs)
    scores, _ = score_requests(model, requests, context=context, device="cpu", autocast_dtype=None)
    for request, score in zip(requests, scores, strict=True):
        expected, count = 0.0, len(request.ids)
        for target in range(request.context, count):
            start = max(0, count - context - 1)
            if count - request.context > context:  # windows of 12 every 6 tokens
                start = max(0, (target - 7) // 6 * 6)
            with torch.no_grad():
                logits = model(torch.tensor([request.ids[start:target]]))[0, -1]
            expected += float(torch.log_softmax(logits, -1)[request.ids[target]])
        assert score == pytest.approx(expected, rel=1e-5)


def test_labels_of_one_token_cost_one_reading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    read = []

    class Counting(ConstantModel):
        def hidden(self, tokens: Tensor) -> Tensor:
            read.append(tokens.numel())
            return super().hidden(tokens)

    write_rows(tmp_path, "toy", [{"q": "four", "label": 0}])
    row = run(Counting(), tokenizer, [make_task()], tmp_path)["tasks"]["toy"]
    assert sum(read) == 4 and row["n"] == 1
    assert row["accuracy_se"] is None and row["accuracy_calibrated"] is None


def test_cut_prompts_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"q": "x" * length, "label": 0} for length in (7, 8, 9, 30)]
    write_rows(tmp_path, "toy", rows)
    row = run(ConstantModel(), tokenizer, [make_task()], tmp_path, context=8)["tasks"]["toy"]
    assert row["cut_prompts"] == 2  # 8 tokens and a label of one fit: the last is never read


# ------------------------------------------------------------------------------------------ records


def test_items_file_and_contaminated_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_rows(tmp_path, "toy", toy_rows(6))
    out = tmp_path / "smallbench_items.jsonl"
    model = FavouriteModel({tokenizer.token_to_id("Ġb"): 5.0})
    exclude = {"toy": {1, 4, 99}, "unknown": {0}}
    result = run(model, tokenizer, [make_task()], tmp_path, exclude=exclude, items_path=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 2, 3, 5]
    assert [line["gold"] for line in lines] == [0, 0, 1, 1]
    for line in lines:
        assert list(line) == ["task", "row", "scores", "prediction", "gold"]
        assert line["prediction"] == 1 and line["scores"][1] - line["scores"][0] > 4.9
    assert result["contaminated_items"] == result["tasks"]["toy"]["contaminated"] == 2
    assert [path.name for path in tmp_path.iterdir() if "items" in path.name] == [out.name]


def test_a_task_without_rows_is_missing_and_not_zero(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_rows(tmp_path, "toy", toy_rows(6))
    tasks = [make_task(), make_task(name="elsewhere", only_in_mirror=True)]
    result = run(ConstantModel(), tokenizer, tasks, tmp_path)
    assert result["missing_tasks"] == ["elsewhere"] and list(result["tasks"]) == ["toy"]
    # No leakage report: how many rows the training text holds is unknown, not 0.
    assert result["contaminated_items"] is result["tasks"]["toy"]["contaminated"] is None
    grouped = run(ConstantModel(), tokenizer, [make_task(group="g")], tmp_path)
    assert grouped["tasks"]["g"]["contaminated"] is None and grouped["tasks"]["g"]["n"] == 6
    gone = run(ConstantModel(), tokenizer, tasks, tmp_path, exclude={"toy": set(range(6))})
    assert gone["accuracy"] is gone["chance"] is None and gone["contaminated_items"] == 6
    assert gone["tasks"]["toy"]["n"] == gone["items"] == 0


@pytest.mark.parametrize("group", [None, "g"])
def test_a_contaminated_task_keeps_its_row_and_is_named(
    group: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Alone or in a group, it stands in no mean and its items are counted as dropped."""
    for name in ("toy", "other"):
        write_rows(tmp_path, name, toy_rows(6))
    tasks = [make_task(group=group), make_task(name="other", group=group, gold="1")]
    model = FavouriteModel({tokenizer.token_to_id("Ġb"): 5.0})
    result = run(model, tokenizer, tasks, tmp_path, exclude={"toy": set(range(6)), "other": {0}})
    assert result["contaminated_tasks"] == ["toy"] and result["contaminated_items"] == 7
    assert (result["accuracy"], result["chance"], result["items"]) == (1.0, 0.5, 5)
    if group is None:
        assert result["tasks"]["toy"] == {"n": 0, "accuracy": None, "accuracy_se": None,
                                         "chance": None, "contaminated": 6}  # fmt: skip
        assert result["tasks"]["other"]["contaminated"] == 1
    else:
        row = result["tasks"]["g"]
        assert (row["n"], row["contaminated"], row["accuracy"]) == (5, 7, 1.0)
        assert row["members"]["toy"]["n"] == 0 and row["members"]["other"]["n"] == 5
        both = {"toy": set(range(6)), "other": set(range(6))}
        gone = run(model, tokenizer, tasks, tmp_path, exclude=both)
        assert gone["tasks"]["g"]["n"] == 0 and gone["contaminated_tasks"] == ["toy", "other"]


def test_the_untrained_model_is_reproducible_and_leaves_the_generator_alone(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_rows(tmp_path, "toy", toy_rows(20))
    config = small_transformer(300).config
    options: dict[str, Any] = {"context": 64, "device": "cpu", "autocast_dtype": None}
    before = torch.get_rng_state()
    rows = [
        evaluate_untrained(config, tokenizer, [make_task()], tmp_path, seed=s, **options)
        for s in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert rows[0] == rows[1] != rows[2]
    margin = rows[0]["tasks"]["toy"]["gold_margin"]
    assert 0 < abs(margin) < 1


def test_result_is_plain_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_rows(tmp_path, "toy", toy_rows(9))
    result = run(small_transformer(300), tokenizer, [make_task(group="g")], tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_adding_a_task_is_an_edit_of_the_list(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task_list = tmp_path / "tasks.yaml"
    task_list.write_text(
        "templates: {base: &base {path: me/toy, split: test, config: default}}\n"
        "tasks:\n"
        "- {<<: *base, name: toy, n: 3, prompt: '{{ q | upper }}', choices: {field: options},\n"
        "   gold: '{{ options.index(answer) }}', metrics: [accuracy, perplexity], chance: 0.5}\n"
    )
    rows = [{"q": "ab", "options": ["x", "y"], "answer": "y"}, {"q": "c", "options": ["x", "y"],
             "answer": "x"}]  # fmt: skip
    write_rows(tmp_path, "toy", rows, path="me/toy", config="default", split="test")
    result = run(ConstantModel(), tokenizer, load_tasks(task_list), tmp_path)
    assert result["tasks"]["toy"]["accuracy"] == 0.5
    assert result["tasks"]["toy"]["n"] == 2
