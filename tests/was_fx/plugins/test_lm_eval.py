"""lm-eval's model "was" and the task that comes with was-fx."""

import json
import runpy
import sys

import pytest
import torch

import was_fx
from was_fx import embedded
from was_fx.plugins.lm_eval import PAIRS, WasLM, minimal_pairs, run_tasks
from was_fx.sparse.sparsify import sparse_state

EAGER = {"device": "cpu", "dtype": "float32", "batch_size": 8}


@pytest.fixture(scope="module")
def schedule(_embedded_model):
    return was_fx.uniform(was_fx.calibrate(_embedded_model, embedded.tokens("calibration", 256, 4)), 0.75)


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory):
    """Three pairs of each phenomenon, 24 in all."""
    lines = PAIRS.read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("pairs") / "few_pairs.jsonl"
    path.write_text("\n".join(line for i, line in enumerate(lines) if i % 25 < 3) + "\n", encoding="utf-8")
    return path


def likelihood(model, tokenizer, text):
    """Log-likelihood of a text after the begin token and a space."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(f" {text}")["input_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None]).sum().item()


def accuracy(model, tokenizer, path):
    """The share of pairs whose right sentence is likelier, computed without lm-eval."""
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = [
        likelihood(model, tokenizer, pair["sentence_good"]) > likelihood(model, tokenizer, pair["sentence_bad"])
        for pair in pairs
    ]
    return sum(right) / len(right)


def test_scores_are_those_of_the_dense_model_and_of_the_oracle(embedded_model, schedule, oracle, few_pairs):
    model = WasLM(embedded_model, tokenizer=str(embedded.path()), prefill="all", **EAGER)
    task = minimal_pairs(few_pairs)
    found = run_tasks(model, [task])["few_pairs"]
    expected = oracle(embedded_model, schedule)
    assert found["acc,none"] == pytest.approx(accuracy(embedded_model, model.tokenizer, few_pairs))
    model.use(schedule)
    found = run_tasks(model, [task])["few_pairs"]
    assert found["acc,none"] == pytest.approx(accuracy(expected, model.tokenizer, few_pairs))
    assert found["acc_stderr,none"] > 0
    assert 0.6 < model.realised.sparsity < 0.95
    model.use(None)
    assert model.realised.sparsity == 0


def test_lm_eval_knows_the_model_by_name(schedule, tmp_path):
    from lm_eval.api.registry import get_model

    schedule.save(tmp_path / "s.safetensors")
    arguments = f"pretrained=embedded,schedule={tmp_path / 's.safetensors'},dtype=float32"
    model = get_model("was").create_from_arg_string(arguments, {"device": "cpu", "batch_size": 4})
    assert type(model).__name__ == "WasLM"
    assert sparse_state(model.model).schedule == schedule


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_lm_evals_command_line_starts_with_the_model_in_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["was_fx.plugins.lm_eval", "run", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("was_fx.plugins.lm_eval", run_name="__main__")
    assert ended.value.code == 0
    assert "--model_args" in capsys.readouterr().out


def test_a_checkpoint_that_was_saved_sparse_is_scored_sparse(embedded_model, schedule, few_pairs, tmp_path):
    """Its prompts are dense when it decodes; likelihoods are made of prompts."""
    was_fx.sparsify(embedded_model, schedule).save_pretrained(tmp_path)
    model = WasLM(str(tmp_path), tokenizer=str(embedded.path()), **EAGER)
    run_tasks(model, [minimal_pairs(few_pairs)], limit=4)
    assert 0.5 < model.realised.sparsity < 0.95


def test_a_task_of_lm_evals_own_form_from_a_folder(tmp_path, few_pairs):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {few_pairs}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{sentence_good}}'\ndoc_to_target: '{{UID}}'\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    found = run_tasks(WasLM(**EAGER), ["mine"], limit=2, include_path=tmp_path)
    assert found["mine"]["exact_match,none"] == 0


def test_two_hundred_pairs_come_with_it():
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    assert len({(pair["sentence_good"], pair["sentence_bad"]) for pair in pairs}) == 200
    assert all(pair["sentence_good"] != pair["sentence_bad"] for pair in pairs)
    assert len({pair["UID"] for pair in pairs}) == 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: WasLM(prefill="dense"), ValueError, "prefill='dense' would score the dense model"),
        (lambda: minimal_pairs("nowhere.jsonl"), FileNotFoundError, "no such file of sentence pairs"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_unknown_task_is_named(monkeypatch):
    import lm_eval.tasks

    class WithoutItsOwn(lm_eval.tasks.TaskManager):
        """lm-eval's own thousands of tasks take a while to read."""

        def __init__(self, **arguments):
            super().__init__(**{**arguments, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", WithoutItsOwn)
    with pytest.raises(ValueError, match="lm-eval has no task 'no_such_task_at_all'"):
        run_tasks(None, ["no_such_task_at_all"])
